"""`phinetune data check --fix`: writes a cleaned set, with rows repaired if possible, and left out if not."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from phinetune.data.check.check import CheckReport
from phinetune.data.check.findings import KINDS, Found
from phinetune.data.check.scan import as_row, scan_file, unreadable
from phinetune.data.check.text_checks import repair
from phinetune.data.read.row import Broken
from phinetune.errors import DataError
from phinetune.files import write_lines

MENDED = ("encoding", "mojibake", "nothing")


@dataclass
class Fixed:
    """What was written.

    Attributes:
        rows: how many rows were written.
        left_out: how many rows were left out, by reason.
        mended: how many rows were repaired, by kind of finding.
        remaining: what still spoils a run, with advice.
    """

    path: str
    rows: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    mended: Counter[str] = field(default_factory=Counter)
    remaining: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """The result as `--json` prints it."""
        return {**vars(self), "left_out": dict(self.left_out), "mended": dict(self.mended)}

    def line(self) -> str:
        """The result in one sentence."""
        parts = [f"Wrote {self.path}: {self.rows:,} rows"]
        if self.mended:
            parts.append("repaired " + ", ".join(f"{count} with {kind}" for kind, count in self.mended.most_common()))
        if self.left_out:
            parts.append("left out " + ", ".join(f"{count}: {why}" for why, count in self.left_out.most_common()))
        return "; ".join(parts)


def check_target(out: Path) -> None:
    """Make sure that the cleaned set can be written, before anything slow begins.

    Raises:
        DataError: `out` exists already, or its name does not end in .jsonl.
    """
    if out.suffix.lower() != ".jsonl":
        raise DataError(f"--fix {out}: the cleaned set is written as JSON Lines; give a name that ends in .jsonl")
    if out.exists():
        raise DataError(f"--fix {out}: something stands there already; give another name, or move it away")


def write_fixed(report: CheckReport, out: Path) -> Fixed:
    """Write the good and the repaired rows of a checked set to `out`, as JSON Lines. Each row keeps its form.

    The files are read again, one row at a time.

    Raises:
        DataError: `out` exists already, its name does not end in .jsonl, or no row would be left.
    """
    check_target(out)
    made = Fixed(str(out))
    made.remaining = [f"{KINDS[f.kind].title}: {KINDS[f.kind].advice}" for f in report.findings.in_order() if _stays(f)]
    write_lines(out, _lines(report, made))
    return made


def _lines(report: CheckReport, made: Fixed) -> Iterator[str]:
    """The rows that stay, as lines of JSON. Counts rows in `made` while they are read."""
    number = -1
    for found in (one for file in report.files for one in scan_file(file, report.split, report.name, report.text_by)):
        row = as_row(found, report.max_length)
        if row is None:
            made.left_out[KINDS[unreadable(found)[0]].title] += 1
            continue
        number += 1
        why = report.left_out.get(number)
        if why:
            made.left_out[why] += 1
            continue
        fields, kinds = _repaired(row.fields)
        if isinstance(found, Broken):
            kinds.add("encoding")
        made.mended.update(KINDS[kind].title for kind in kinds)
        made.rows += 1
        yield _line(fields)
    if not made.rows:
        raise DataError(f"--fix {made.path}: no row would be left, so nothing was written")


def _stays(found: Found) -> bool:
    """Whether a finding also spoils a run on the cleaned set: one that comes from the checkpoint or the settings."""
    return found.spoils and not KINDS[found.kind].left_out and found.kind not in MENDED


def _line(fields: Any) -> str:
    line = json.dumps(fields, ensure_ascii=False, default=str)
    try:
        line.encode()
    except UnicodeEncodeError:  # a field that is not used contains half of a character, which stays escaped
        line = json.dumps(fields, default=str)
    return line + "\n"


def _repaired(value: Any) -> tuple[Any, set[str]]:
    """The value with every text in it repaired, and the kinds of what was repaired."""
    if isinstance(value, str):
        return repair(value)
    if isinstance(value, Mapping):
        pairs = {key: _repaired(item) for key, item in value.items()}
        return {key: item for key, (item, _) in pairs.items()}, set().union(*(kinds for _, kinds in pairs.values()))
    if isinstance(value, (list, tuple)):
        items = [_repaired(item) for item in value]
        return [item for item, _ in items], set().union(*(kinds for _, kinds in items))
    return value, set()
