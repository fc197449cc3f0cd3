"""Divides large sources into pieces that processes read by themselves. Each row comes with its place.

JSON Lines and data sets of `datasets` are read where they are. Reading of a Parquet, CSV or JSON file can't begin in
its middle, so such a file is read once and copied to a temporary file whose reading can.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import pyarrow
import pyarrow.parquet

from phinetune.data.read.any_source import scan_rows
from phinetune.data.read.datasets_library import open_dataset
from phinetune.data.read.encodings import NotText, is_utf16_or_utf32, lines_of, refuse_other_kinds
from phinetune.data.read.files import is_list, read_file, read_lines, rows_of
from phinetune.data.read.folders import files_by_split, files_of, is_folder_of_files, is_name
from phinetune.data.read.held_data import held_rows
from phinetune.data.read.plain_values import jsonable
from phinetune.data.read.row import Broken, Row
from phinetune.files import file_digest

PIECE = 2048  # rows in a piece; small enough for all processes to get some, and to hold in memory
LINES = (".jsonl", ".ndjson")


class SourcePart(NamedTuple):
    """A piece of a source: where it begins and ends (in bytes, batches or rows), and the number of its first line or
    row. `file` is the number of its file in a folder.
    """

    start: int
    stop: int
    first: int
    file: int = 0


class Source(Protocol):
    """A source that can be read piece by piece in any order. It goes to other processes, so it holds no open file."""

    def pieces(self, limit: int | None) -> list[SourcePart]:
        """The pieces in order: as many as hold `limit` rows, all if `limit` is None."""

    def read(self, piece: SourcePart) -> Iterator[Row | Broken]:
        """The rows and the broken places of a piece, in order."""


def digest(source: str, split: str, name: str | None = None) -> str:
    """SHA-256 of a source's content: of the file, or of the rows in memory; of a data set or a folder, of the split's
    name and the files.
    """
    held = held_rows(source)
    if held:
        return f"{split if held.has_splits else ''} {held.digest}"
    path = Path(source).expanduser()
    if path.is_file():
        return file_digest(path)
    if is_folder_of_files(path):
        splits = files_by_split(path, name)
        files = [file for listed in splits.values() for file in listed]
        if is_name(split):
            files = files_of(path, splits, split)
    else:
        files = [file["filename"] for file in open_dataset(source, split, name).cache_files]
    return hashlib.sha256("".join([split, *(file_digest(Path(file)) for file in files)]).encode()).hexdigest()


def open_source(source: str, split: str, work: Path, name: str | None = None, text_by: str = "paragraph") -> Source:
    """The source, ready to be read in pieces.

    Args:
        work: a folder for a copy, named `source.*`, if the source itself can't be read in pieces.
        name: the configuration of a folder or hub id.
        text_by: see `scan_rows`.
    """
    if held_rows(source):
        return _copy_rows(scan_rows(source, split), work / "source.jsonl")
    path = Path(source).expanduser()
    if path.is_file():
        return _open_file(path, work / "source", name, text_by)
    if not is_folder_of_files(path):
        return DatasetSource(source, open_dataset(source, split, name))
    if not is_name(split):
        return _copy_rows(scan_rows(source, split, name, text_by=text_by), work / "source.jsonl")
    files = files_of(path, files_by_split(path, name), split)
    opened = [_open_file(file, work / f"source.{i}", None, text_by) for i, file in enumerate(files)]
    return FolderSource(opened)


def _open_file(path: Path, copy: Path, name: str | None, text_by: str) -> Source:
    """A file, ready to be read in pieces. `copy`: the name of a copy, without an ending."""
    if path.suffix.lower() in LINES and _is_text(path):
        return LineSource(path)
    if path.suffix.lower() == ".parquet":
        return _copy_parquet(path, copy)
    return _copy_rows(read_file(path, name, text_by), Path(f"{copy}.jsonl"))


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
        lines = lines_of(self.path, piece.start, piece.stop, piece.first)
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
        try:
            with pyarrow.memory_map(str(self.path)) as file:
                rows = rows_of(pyarrow.ipc.open_file(file).get_batch(piece.start))
        except KeyError as error:
            return iter([Broken(self.name, f"not a readable Parquet file: {error}")])
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


@dataclass(frozen=True)
class FolderSource:
    """The files of a folder, one after the other."""

    files: Sequence[Source]

    def pieces(self, limit: int | None) -> list[SourcePart]:
        pieces: list[SourcePart] = []
        sure = 0  # rows that the pieces hold at least; a file's last piece may hold a single one
        for number, source in enumerate(self.files):
            own = source.pieces(limit)
            pieces += [piece._replace(file=number) for piece in own]
            sure += max(0, len(own) - 1) * PIECE
            if limit is not None and sure >= limit:
                break
        return pieces

    def read(self, piece: SourcePart) -> Iterator[Row | Broken]:
        return self.files[piece.file].read(piece)


def _copy_parquet(path: Path, copy: Path) -> Source:
    """Copy a Parquet file to an Arrow file with `PIECE` rows in each record batch."""
    target = Path(f"{copy}.arrow")
    try:
        with (
            pyarrow.parquet.ParquetFile(path) as file,
            pyarrow.OSFile(str(target), "wb") as sink,
            pyarrow.ipc.new_file(sink, file.schema_arrow) as writer,
        ):
            for batch in file.iter_batches(PIECE):
                writer.write_batch(batch)
    except (pyarrow.ArrowException, OSError):
        return _copy_rows(read_file(path), Path(f"{copy}.jsonl"))  # this records where the file is broken
    return BatchSource(target, str(path))


def _copy_rows(items: Iterable[Row | Broken], target: Path) -> Source:
    """Copy rows and broken places to JSON Lines."""
    with target.open("w", encoding="ascii") as file:
        for item in items:
            values = (*item,) if isinstance(item, Row) else (item.where, item.problem, item.kind)
            file.write(json.dumps(values, default=jsonable) + "\n")
    return LineSource(target, is_copy=True)


def _from_copy(values: list[Any]) -> Row | Broken:
    return Row(*values) if len(values) == len(Row._fields) else Broken(*values)
