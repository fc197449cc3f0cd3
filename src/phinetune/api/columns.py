"""`columns`: which column of a file is what, proposed from the names, with rows read that way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from phinetune.api.sections import DataValue, holds_data, make_sections, one_or_several
from phinetune.chats.template import Message
from phinetune.config.data import DataSection
from phinetune.config.row_forms import READY
from phinetune.data.prepare.sources import check_there
from phinetune.data.read.any_source import read_first
from phinetune.data.read.messages import detect_form, to_messages
from phinetune.data.read.plain_values import as_text
from phinetune.data.read.propose import Proposal, propose, quoted
from phinetune.data.read.row import Row
from phinetune.data.read.row_mapping import RowMapping
from phinetune.errors import DataError, RowError
from phinetune.files import write_text

LOOKED_AT = 200  # rows from which the columns are judged
ENOUGH_TO_HOLD_OUT = 20


@dataclass(frozen=True)
class Column:
    """A column: in how many of the rows it is filled, and an example."""

    name: str
    filled: int
    example: str


@dataclass(frozen=True)
class ReadRow:
    """A row read as proposed: its turns, or why it can't be read. A row of text has one turn without a role."""

    where: str
    messages: Sequence[Message] = ()
    problem: str | None = None


@dataclass(frozen=True)
class Columns:
    """What a file's columns are, and what they may stand for.

    Attributes:
        rows: how many of its first rows were looked at.
        proposal: what the columns may be.
        shown: rows read that way.
        config: a configuration with these lines, ready to be written to a file.
        written: the file that it was written to.
    """

    file: str
    rows: int
    columns: Sequence[Column]
    proposal: Proposal
    shown: Sequence[ReadRow] = field(default_factory=list)
    config: Sequence[str] = field(default_factory=list)
    written: Path | None = None


@holds_data
def columns(
    file: DataValue, rows: int = 2, *, data: Mapping[str, Any] | None = None, out: str | Path | None = None
) -> Columns:
    """Propose which column is what, and show rows read that way. Needs no model.

    Args:
        file: a file of rows, or a data object (see `train`).
        rows: how many rows to show.
        data: the section `data`: the split and the like; what it says of columns is shown in place of a proposal.
        out: write a configuration with the proposal to this new file.

    Raises:
        PhinetuneError: the file is not there or holds no row, or `out` is taken.
    """
    section = make_sections(data=data).data
    return columns_of(section, one_or_several(file, "file")[0], rows, Path(out) if out else None)


def columns_of(section: DataSection, file: str, rows: int = 2, out: Path | None = None) -> Columns:
    """`columns` for a validated section."""
    check_there([file])
    if out and out.exists():
        raise DataError(f"--out {out}: something stands there already; give another name, or move it away")
    found, broken = read_first(file, section.split, LOOKED_AT, section.name, section.text_by)
    if not found:
        raise DataError(broken or f"{file}: there is no row in it")
    proposal = propose([row.fields for row in found])
    if RowMapping.of(section) is None and proposal.knobs():
        section = DataSection.model_validate({**section.model_dump(exclude_unset=True), **proposal.knobs()})
    config = _config(file, proposal, len(found), section)
    if out:
        write_text(out, "\n".join(config) + "\n")
    shown = [_read(row, section) for row in found[:rows]]
    return Columns(file, len(found), _columns(found), proposal, shown, config, out)


def _columns(rows: Sequence[Row]) -> list[Column]:
    made = []
    for name in dict.fromkeys(key for row in rows for key in row.fields):
        texts = [_written(row.fields.get(name)) for row in rows]
        filled = [text for text in texts if text.strip()]
        made.append(Column(name, len(filled), " ".join(filled[0].split()) if filled else ""))
    return made


def _written(value: Any) -> str:
    try:
        return as_text(value)[0]
    except ValueError as error:
        return f"({error})"


def _read(row: Row, section: DataSection) -> ReadRow:
    mapping = RowMapping.of(section)
    try:
        made = mapping(row.fields) if mapping else None
        fields = made.fields if made else row.fields
        form = detect_form(fields) if section.format == "auto" else section.format
        if form in READY:
            text = fields.get("text") or f"{len(fields.get('input_ids') or ())} ids"
            return ReadRow(row.where, [{"role": "", "content": str(text)}])
        messages = to_messages(fields, form)
        return ReadRow(row.where, made.with_system(messages) if made else messages)
    except RowError as error:
        return ReadRow(row.where, problem=str(error))


def _config(file: str, proposal: Proposal, rows: int, section: DataSection) -> list[str]:
    name = Path(file).name.split(".")[0] or "mine"
    split = [f"  split: {section.split}"] if section.split != "train" else []
    return [
        "model: starter  # or a hub id or a folder of the Phi-3 family",
        "data:",
        f"  train: {quoted(file)}",
        *split,
        *([f"  eval: {0.1 if rows >= LOOKED_AT else 0.25}"] if rows >= ENOUGH_TO_HOLD_OUT else []),
        *proposal.yaml(),
        "training_config:",
        f"  output_dir: {quoted(f'runs/{name}')}",
    ]
