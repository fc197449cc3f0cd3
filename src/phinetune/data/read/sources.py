"""Large sources in pieces that processes read by themselves, each row with the place it came from.

JSON Lines are read where they lie; a data set of `datasets` too. Parquet, CSV and JSON can't be entered in the middle,
so they are read once and laid down beside the cache in a form that can.
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

from phinetune.data.read.encodings import NotText, is_wide, lines_of, refuse_other_kinds
from phinetune.data.read.rows import Broken, Row, is_list, open_dataset, read_lines, scan_rows

PIECE = 2048  # rows: enough to spread over processes, few enough to hold
LINES = (".jsonl", ".ndjson")


class SourcePart(NamedTuple):
    """A part of a source: where it begins and ends (bytes, batches or rows), and its first line or row."""

    start: int
    stop: int
    first: int


class Source(Protocol):
    """A source that can be entered at any of its pieces. Goes to other processes, so it holds no open file."""

    def pieces(self, limit: int | None) -> list[SourcePart]:
        """Its pieces in order, so many that they hold `limit` rows."""

    def read(self, piece: SourcePart) -> Iterator[Row | Broken]:
        """The rows of a piece, and its broken places."""


def digest(source: str, split: str) -> str:
    """SHA-256 of a source's content: the file's, or of the files that a data set lies in."""
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
    """The source, what can't be read in pieces laid down in the folder `work` first."""
    path = Path(source).expanduser()
    if not path.is_file():
        return DatasetSource(source, open_dataset(source, split))
    if path.suffix.lower() in LINES and _is_text(path):
        return LineSource(path)
    if path.suffix.lower() == ".parquet":
        return _lay_down_parquet(path, work / "source.arrow")
    return _lay_down_rows(source, split, work / "source.jsonl")


def _is_text(path: Path) -> bool:
    try:
        refuse_other_kinds(path)
    except NotText:
        return False
    return not is_wide(path) and not is_list(path)


@dataclass(frozen=True)
class LineSource:
    """A file of lines; `laid_down` where each is a row that `_lay_down_rows` wrote."""

    path: Path
    laid_down: bool = False

    def pieces(self, limit: int | None) -> list[SourcePart]:
        made: list[SourcePart] = []
        start = place = rows = total = 0
        first = number = 1
        with self.path.open("rb") as file:
            for number, line in enumerate(file, 1):
                place += len(line)
                rows += not line.isspace()
                if rows == PIECE:
                    made.append(SourcePart(start, place, first))
                    total += rows
                    start, first, rows = place, number + 1, 0
                    if limit is not None and total >= limit:
                        return made
        return [*made, SourcePart(start, place, first)] if place > start else made

    def read(self, piece: SourcePart) -> Iterator[Row | Broken]:
        lines = lines_of(self.path, *piece)
        if not self.laid_down:
            return read_lines(self.path, lines)
        return (_taken_up(json.loads(line)) for _, line in lines)


@dataclass(frozen=True)
class BatchSource:
    """Record batches of an Arrow file, whose rows go by the name of the file they came from."""

    path: Path
    name: str

    def pieces(self, limit: int | None) -> list[SourcePart]:
        made: list[SourcePart] = []
        total = 0
        with pyarrow.memory_map(str(self.path)) as file:
            reader = pyarrow.ipc.open_file(file)
            for i in range(reader.num_record_batches):
                made.append(SourcePart(i, i + 1, total + 1))
                total += reader.get_batch(i).num_rows
                if limit is not None and total >= limit:
                    break
        return made

    def read(self, piece: SourcePart) -> Iterator[Row | Broken]:
        with pyarrow.memory_map(str(self.path)) as file:
            rows = pyarrow.ipc.open_file(file).get_batch(piece.start).to_pylist()
        return (Row(f"{self.name}: row {number}", fields) for number, fields in enumerate(rows, piece.first))


@dataclass(frozen=True)
class DatasetSource:
    """A data set of `datasets`, on disk."""

    name: str
    data: Any

    def pieces(self, limit: int | None) -> list[SourcePart]:
        rows = len(self.data) if limit is None else min(limit, len(self.data))
        return [SourcePart(i, min(i + PIECE, rows), i + 1) for i in range(0, rows, PIECE)]

    def read(self, piece: SourcePart) -> Iterator[Row | Broken]:
        rows = self.data.select(range(piece.start, piece.stop))
        return (Row(f"{self.name}: row {number}", dict(fields)) for number, fields in enumerate(rows, piece.first))


def _lay_down_parquet(path: Path, target: Path) -> Source:
    try:
        with (
            pyarrow.parquet.ParquetFile(path) as file,
            pyarrow.OSFile(str(target), "wb") as sink,
            pyarrow.ipc.new_file(sink, file.schema_arrow) as writer,
        ):
            for batch in file.iter_batches(PIECE):
                writer.write_batch(batch)
    except (pyarrow.ArrowException, OSError):
        return _lay_down_rows(str(path), "", target.with_suffix(".jsonl"))  # which says where it is broken
    return BatchSource(target, str(path))


def _lay_down_rows(source: str, split: str, target: Path) -> Source:
    with target.open("w", encoding="ascii") as file:
        for found in scan_rows(source, split):
            kept = (*found,) if isinstance(found, Row) else (found.where, found.problem, found.kind)
            file.write(json.dumps(kept) + "\n")
    return LineSource(target, laid_down=True)


def _taken_up(kept: list[Any]) -> Row | Broken:
    return Row(*kept) if len(kept) == len(Row._fields) else Broken(*kept)
