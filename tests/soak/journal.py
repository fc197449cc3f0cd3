"""What a sweep has done so far, so that it can be cut off and called again: an hour of a quiet machine is rare."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).resolve().parents[2] / "src"


def source_hash() -> str:
    """Of all of phinetune's files: cases of another tree prove nothing about this one."""
    found = hashlib.sha256()
    for file in sorted(SOURCE.rglob("*.py")):
        found.update(f"{file.relative_to(SOURCE)} {file.stat().st_size} ".encode() + file.read_bytes())
    return found.hexdigest()[:16]


class Journal:
    """A file with a JSON line a case. Without a file it keeps nothing."""

    def __init__(self, file: Path | None, form: str, operations: int) -> None:
        """Read what the same tree did in the same form.

        Args:
            operations: of the undisturbed run; with another number, a case's number means another operation.
        """
        self._file, self._key = file, f"{source_hash()} {form} {operations}"
        lines = file.read_text().splitlines() if file and file.is_file() else []
        entries = [entry for entry in map(_read, lines) if entry.get("key") == self._key]
        self.done: dict[str, dict[str, Any]] = {entry["case"]: entry for entry in entries}

    def add(self, case: str, **found: Any) -> None:
        """Keep a finished case and what it found."""
        if self._file:
            with self._file.open("a") as lines:
                lines.write(json.dumps({"key": self._key, "case": case, **found}) + "\n")


def _read(line: str) -> dict[str, Any]:
    try:
        entry: dict[str, Any] = json.loads(line)
    except ValueError:  # cut off while it was written: that case is tried again
        return {}
    return entry
