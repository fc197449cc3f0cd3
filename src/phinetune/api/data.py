"""`check` and `preview`: chats looked at before a run does."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from phinetune.api.held_out import row_encoder
from phinetune.api.sections import DataValue, SectionValue, holds_data, make_sections, one_or_several
from phinetune.config.data import DataSection
from phinetune.config.run import RunConfig
from phinetune.data.check.check import CheckReport, check_files
from phinetune.data.check.fix import Fixed, check_target, write_fixed
from phinetune.data.prepare.encode_rows import RowEncoder
from phinetune.data.prepare.first_rows import LOOKED_AT, missing_columns
from phinetune.data.prepare.named_sources import weighted
from phinetune.data.prepare.sources import check_there, held_out_section, identity
from phinetune.data.preview import PreviewedRow, preview_rows
from phinetune.data.read.any_source import read_first
from phinetune.data.read.row_mapping import RowMapping
from phinetune.errors import DataError, PhinetuneError
from phinetune.logs import quiet_libraries


@dataclass(frozen=True)
class DataCheck:
    """What a check found, and what was written from it.

    Attributes:
        files: the files that were looked at.
        report: all findings.
        fixed: the cleaned set; None where none was asked for or could be written.
        failure: why the cleaned set could not be written.
    """

    files: Sequence[str]
    report: CheckReport
    fixed: Fixed | None = None
    failure: DataError | None = None

    def to_dict(self) -> dict[str, Any]:
        fixed = self.fixed.to_dict() if self.fixed else None
        return {"files": list(self.files), **self.report.to_dict(), "fixed": fixed}


@holds_data
def check(
    data: DataValue,
    held_out: DataValue = (),
    *,
    model: SectionValue = None,
    training_config: Mapping[str, Any] | None = None,
    objective: SectionValue = None,
    fix: str | Path | None = None,
) -> DataCheck:
    """Look at every row: what is kept, cut and dropped, and what stands out.

    Args:
        data: file of chats, a list of them, a data object (see `train`), or the section `data`.
        held_out: the same for held-out chats; those of the section `data` if left out.
        model, training_config, objective: the run's sections, for its checkpoint and its lengths.
        fix: write the rows that are sound or can be mended to this new .jsonl file.

    Raises:
        PhinetuneError: a file is not there, or the cleaned set can't be written.
    """
    config = make_sections(model=model, data=data, training_config=training_config, objective=objective)
    others = one_or_several(held_out, "held_out") if _is_given(held_out) else []
    made = check_config(config, held_out=others, fix=Path(fix) if fix else None)
    if made.failure:
        raise made.failure
    return made


def check_config(
    config: RunConfig,
    files: Sequence[str] = (),
    held_out: Sequence[str] = (),
    fix: Path | None = None,
    on_row: Callable[[], None] = lambda: None,
) -> DataCheck:
    """`check` for a validated configuration. A cleaned set that can't be written does not lose the report.

    Args:
        files: what to look at in place of the configuration's `data.train`.
        on_row: called after each row.
    """
    quiet_libraries()
    chosen = list(files) or [path for path, _ in weighted(config.data.train)]
    if not chosen:
        raise PhinetuneError("no file of chats: name one, or a configuration with data.train (--config CONFIG)")
    encode, section = row_encoder(config), None if held_out else held_out_section(config.data)
    others = list(held_out) or _not_trained_on(config.data, section, files)
    check_there([*chosen, *others])
    if fix:
        check_target(fix)
    look_at_columns(encode, chosen, section)
    report = check_files(chosen, others, encode, on_row, replace(encode, section=section) if section else None)
    if not fix:
        return DataCheck(chosen, report)
    try:
        return DataCheck(chosen, report, write_fixed(report, fix))
    except DataError as error:
        return DataCheck(chosen, report, failure=error)


def look_at_columns(encode: RowEncoder, files: Sequence[str], held_out: DataSection | None) -> None:
    """Make sure that the columns which a configuration names are there; a check of every row would find none of them.

    Raises:
        DataError: a file has no such column.
    """
    mapping = RowMapping.of(encode.section)
    problems: list[str] = []
    others = [(path, held_out) for path, _ in weighted(held_out.train)] if held_out else []
    for path, section in [*((file, encode.section) for file in files), *others] if mapping else ():
        rows, _ = read_first(path, section.split, LOOKED_AT, section.name, section.text_by)
        if mapping and rows:
            problems += missing_columns(path, [row.fields for row in rows], mapping)
    if problems:
        raise DataError(problems)


def _is_given(held_out: DataValue) -> bool:
    return not (held_out is None or (isinstance(held_out, (list, tuple)) and not held_out))


@holds_data
def preview(
    file: DataValue,
    rows: int = 3,
    *,
    model: SectionValue = None,
    data: Mapping[str, Any] | None = None,
    training_config: Mapping[str, Any] | None = None,
    objective: SectionValue = None,
) -> list[PreviewedRow]:
    """The first rows as the model will see them: by role, what is trained on, special tokens, where a row is cut.

    Args:
        file: a file of chats, or a data object (see `train`).
        model, data, training_config, objective: the run's sections, for its checkpoint, lengths and data settings.

    Raises:
        PhinetuneError: the file is not there.
    """
    config = make_sections(model=model, data=data, training_config=training_config, objective=objective)
    return preview_config(config, one_or_several(file, "file")[0], rows)


def preview_config(config: RunConfig, file: str, rows: int = 3, first: int = 0) -> list[PreviewedRow]:
    """`preview` for a validated configuration; `first` rows are left out before."""
    quiet_libraries()
    check_there([file])
    return list(preview_rows(file, row_encoder(config), rows, first))


def _not_trained_on(data: DataSection, held_out: DataSection | None, files: Sequence[str]) -> list[str]:
    """The configuration's sources of held-out chats, without the ones that are looked at as training files."""
    if held_out is None:
        return []
    looked_at = {identity(path, data) for path in files}
    return [path for path, _ in weighted(held_out.train) if identity(path, held_out) not in looked_at]
