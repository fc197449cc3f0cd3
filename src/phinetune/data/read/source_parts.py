"""Divides large sources into pieces that processes read by themselves. Each row comes with its place.

JSON Lines and data sets of `datasets` are read where they are. Reading of a Parquet, CSV or JSON file can't begin in
its middle, so such a file is read once and copied to a temporary file whose reading can.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import pyarrow
import pyarrow.parquet

from phinetune.data.read.any_source import scan_rows
from phinetune.data.read.datasets_library import open_dataset
from phinetune.data.read.encodings import NotText, is_utf16_or_utf32, lines_of, refuse_other_kinds
from phinetune.data.read.files import is_list, read_lines
from phinetune.data.read.row import Broken, Row

PIECE = 2048  # rows in a piece; small enough for all processes to get some, and to hold in memory
LINES = (".jsonl", ".ndjson")


class SourcePart(NamedTuple):
    """A piece of a source: where it begins and ends (in bytes, batches or rows), and the number of its first line or
    row.
    """

    start: int
    stop: int
    first: int


class Source(Protocol):
    """A source that can be read piece by piece in any order. It goes to other processes, so it holds no open file."""

    def pieces(self, limit: int | None) -> list[SourcePart]:
        """The pieces in order: as many as hold `limit` rows, all if `limit` is None."""

    def read(self, piece: SourcePart) -> Iterator[Row | Broken]:
        """The rows and the broken places of a piece, in order."""


def digest(source: str, split: str) -> str:
    """SHA-256 of a source's content: of the file, or of the split's name and the files of a data set."""
    path = Path(source).expanduser()
    if path.is_file():
        return file_digest(path)
    files = [file["filename"] for file in open_dataset(source, split).cache_files]
    return hashlib.sha256("".join([split, *(file_digest(Path(file)) for file in files)]).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    total = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            total.update(part)
    return total.hexdigest()


def open_source(source: str, split: str, work: Path) -> Source:
    """The source, ready to be read in pieces.

    Args:
        work: a folder for a copy, named `source.*`, if the source itself can't be read in pieces.
    """
    path = Path(source).expanduser()
    if not path.is_file():
        return DatasetSource(source, open_dataset(source, split))
    if path.suffix.lower() in LINES and _is_text(path):
        return LineSource(path)
    if path.suffix.lower() == ".parquet":
        return _copy_parquet(path, work / "source.arrow")
    return _copy_rows(source, split, work / "source.jsonl")


def _is_text(path: Path) -> bool:
    try:
        refuse_other_kinds(path)
    except NotText:
        return False
    return not is_utf16_or_utf32(path) and not is_list(path)


@dataclass(frozen=True)
class LineSource:
    """A file of lines of JSON. `is_copy`: `_copy_rows` wrote it."""

    path: Path
    is_copy: bool = False

    def pieces(self, limit: int | None) -> list[SourcePart]:
        pieces: list[SourcePart] = []
        start = place = rows = total = 0
        first = number = 1
        with self.path.open("rb") as file:
            for number, line in enumerate(file, 1):
                place += len(line)
                rows += not line.isspace()
                if rows == PIECE:
                    pieces.append(SourcePart(start, place, first))
                    total += rows
                    start, first, rows = place, number + 1, 0
                    if limit is not None and total >= limit:
                        return pieces
        return [*pieces, SourcePart(start, place, first)] if place > start else pieces

    def read(self, piece: SourcePart) -> Iterator[Row | Broken]:
        lines = lines_of(self.path, *piece)
        if not self.is_copy:
            return read_lines(self.path, lines)
        return (_from_copy(json.loads(line)) for _, line in lines)


@dataclass(frozen=True)
class BatchSource:
    """The record batches of an Arrow file. `name` is the file that they were copied from; it stands in rows' places."""

    path: Path
    name: str

    def pieces(self, limit: int | None) -> list[SourcePart]:
        pieces: list[SourcePart] = []
        total = 0
        with pyarrow.memory_map(str(self.path)) as file:
            reader = pyarrow.ipc.open_file(file)
            for i in range(reader.num_record_batches):
                pieces.append(SourcePart(i, i + 1, total + 1))
                total += reader.get_batch(i).num_rows
                if limit is not None and total >= limit:
                    break
        return pieces

    def read(self, piece: SourcePart) -> Iterator[Row | Broken]:
        with pyarrow.memory_map(str(self.path)) as file:
            rows = pyarrow.ipc.open_file(file).get_batch(piece.start).to_pylist()
        return (Row(f"{self.name}: row {number}", fields) for number, fields in enumerate(rows, piece.first))


@dataclass(frozen=True)
class DatasetSource:
    """A data set of `datasets` on disk."""

    name: str
    data: Any

    def pieces(self, limit: int | None) -> list[SourcePart]:
        rows = len(self.data) if limit is None else min(limit, len(self.data))
        return [SourcePart(i, min(i + PIECE, rows), i + 1) for i in range(0, rows, PIECE)]

    def read(self, piece: SourcePart) -> Iterator[Row | Broken]:
        rows = self.data.select(range(piece.start, piece.stop))
        return (Row(f"{self.name}: row {number}", dict(fields)) for number, fields in enumerate(rows, piece.first))


def _copy_parquet(path: Path, target: Path) -> Source:
    """Copy a Parquet file to an Arrow file with `PIECE` rows in each record batch."""
    try:
        with (
            pyarrow.parquet.ParquetFile(path) as file,
            pyarrow.OSFile(str(target), "wb") as sink,
            pyarrow.ipc.new_file(sink, file.schema_arrow) as writer,
        ):
            for batch in file.iter_batches(PIECE):
                writer.write_batch(batch)
    except (pyarrow.ArrowException, OSError):
        return _copy_rows(str(path), "", target.with_suffix(".jsonl"))  # this records where the file is broken
    return BatchSource(target, str(path))


def _copy_rows(source: str, split: str, target: Path) -> Source:
    """Copy the rows and the broken places of a source to JSON Lines."""
    with target.open("w", encoding="ascii") as file:
        for item in scan_rows(source, split):
            values = (*item,) if isinstance(item, Row) else (item.where, item.problem, item.kind)
            file.write(json.dumps(values) + "\n")
    return LineSource(target, is_copy=True)


def _from_copy(values: list[Any]) -> Row | Broken:
    return Row(*values) if len(values) == len(Row._fields) else Broken(*values)
