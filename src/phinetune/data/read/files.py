"""Rows of a file, each with its place: JSON Lines, JSON, Parquet; tables and texts are read in files of their own."""

from __future__ import annotations

import io
import json
import logging
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from phinetune.data.read.encodings import (
    NotText,
    bad_place,
    decode_line,
    is_utf16_or_utf32,
    lines_of,
    refuse_other_kinds,
)
from phinetune.data.read.packed import PACKED, kind_of, open_bytes
from phinetune.data.read.row import Broken, Row
from phinetune.data.read.safe_json import TOO_DEEP, first_twin, is_deep, load_json, load_with_twins
from phinetune.data.read.tables import can_read_sheets, read_csv, read_sheet, read_tsv
from phinetune.data.read.text_files import read_text_file

logger = logging.getLogger(__name__)

SHEETS = ".xlsx"
TEXTS = (".txt", ".md")
BATCH = 1024  # rows of a Parquet file in memory at a time


def unknown_kind(path: Path) -> str | None:
    """What is wrong with the kind of a file, judged by its name; None if it can be read."""
    kind = kind_of(path)
    if kind == SHEETS and not can_read_sheets():
        return f"{path}: .xlsx files are read by openpyxl, which is not installed: pip install 'phinetune[xlsx]'"
    hint = "; unpack it first" if kind in PACKED else ""
    return None if kind in READERS else f"{path}: unknown kind of file{hint}; known: {', '.join(READERS)}"


def has_sheets(path: Path) -> bool:
    """Whether a file is made of sheets, which have names."""
    return kind_of(path) == SHEETS


def read_file(path: Path, name: str | None = None, text_by: str = "paragraph") -> Iterator[Row | Broken]:
    """The rows of a file and its broken places, in order.

    Args:
        name: of the sheet of an .xlsx file.
        text_by: what is a row of a text: `paragraph` or `tokens`.
    """
    try:
        kind = kind_of(path)
        refuse_other_kinds(path)
        if kind in (".json", ".csv", ".tsv", *TEXTS) and is_utf16_or_utf32(path):
            line, problem = bad_place(path)
            yield Broken(f"{path}:{line}", problem, "encoding")
            return
        if kind == SHEETS:
            yield from read_sheet(path, name)
        elif kind in TEXTS:
            yield from read_text_file(path, text_by)
        else:
            yield from READERS[kind](path)
    except NotText as error:
        yield Broken(f"{path}:{error.line}", str(error))
    except UnicodeDecodeError:
        line, problem = bad_place(path)
        yield Broken(f"{path}:{line}", problem, "encoding")
    except (EOFError, zlib.error):
        yield Broken(str(path), "the archive is damaged: it ends in its middle, or its bytes are not its own")
    except OSError as error:
        yield Broken(str(path), f"can't be read: {error.strerror or error}")


def _json_lines(path: Path) -> Iterator[Row | Broken]:
    # A file with the name of JSON Lines may hold one JSON list.
    return _json(path) if is_list(path) else read_lines(path, lines_of(path))


def is_list(path: Path) -> bool:
    """Whether a file holds one JSON list, whatever its name says."""
    with open_bytes(path) as file:
        listed = file.read(64).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")
    return listed and not is_utf16_or_utf32(path)


def read_lines(path: Path, lines: Iterable[tuple[int, bytes | str]]) -> Iterator[Row | Broken]:
    """The rows in numbered lines of JSON, and the broken lines."""
    for number, raw in lines:
        line, not_utf8 = decode_line(raw)
        where = f"{path}:{number}"
        if line is None:
            yield Broken(where, not_utf8 or "", "encoding")
            continue
        if not line.strip():
            continue
        fields, not_json = _load(line.rstrip("\r\n"))
        if not_json:
            yield Broken(where, not_json)
        elif not isinstance(fields, dict):
            yield Broken(where, f"expected a JSON object, found {_kind(fields)}")
        elif not_utf8:
            yield Broken(where, not_utf8, "encoding", fields)
        else:
            yield Row(where, fields)


def _load(text: str) -> tuple[Any, str | None]:
    """The value of a JSON text, and what is wrong with the text (None if nothing is)."""
    try:
        return load_json(text), None
    except ValueError as error:
        return None, f"broken JSON: {error}"


def _json(path: Path) -> Iterator[Row | Broken]:
    with io.TextIOWrapper(open_bytes(path), encoding="utf-8-sig") as file:
        text = file.read()
    try:
        tree, twins = load_with_twins(text)
    except json.JSONDecodeError as error:
        by_line = kind_of(path) != ".json" or text[: error.pos].rstrip().endswith("}")
        if error.msg == "Extra data" and by_line:
            yield from read_lines(path, lines_of(path))  # JSON Lines under the wrong name
        else:
            yield Broken(f"{path}:{error.lineno}", f"broken JSON: {error.msg} (column {error.colno})")
        return
    except (RecursionError, ValueError):
        yield Broken(str(path), _load(text)[1] or "broken JSON")
        return
    if id(tree) in twins:
        yield Broken(str(path), twins[id(tree)][1])
        return
    rows, start = _unwrapped(path, tree, text)
    if not isinstance(rows, list):
        yield Broken(str(path), f"expected a list of objects, found {_kind(rows)}")
        return
    lines = _lines_of_items(text, start, len(rows))
    for number, (line, fields) in enumerate(zip(lines, rows, strict=True), 1):
        where = f"{path}:{line}: row {number}" if line else f"{path}: row {number}"
        if not isinstance(fields, dict):
            yield Broken(where, f"expected an object, found {_kind(fields)}")
            continue
        problem = TOO_DEEP if is_deep(fields) else first_twin(fields, twins) if twins else None
        yield Broken(where, problem) if problem else Row(where, fields)


def _unwrapped(path: Path, tree: Any, text: str) -> tuple[Any, int]:
    """The list of rows of a JSON file, and where it begins in the text. An object holds the list, or is a row."""
    if not isinstance(tree, dict):
        return tree, 0
    lists = [key for key, value in tree.items() if isinstance(value, list) and value and isinstance(value[0], dict)]
    if len(lists) != 1 or "messages" in tree or "conversations" in tree:
        return [tree], 0
    key = lists[0]
    beside = [one for one in tree if one != key]
    if beside:
        logger.warning("%s: not read beside `%s`: %s", path, key, ", ".join(beside))
    opening = re.search(rf"{re.escape(json.dumps(key))}\s*:\s*\[", text)
    return tree[key], opening.end() - 1 if opening else 0


def _lines_of_items(text: str, start: int, count: int) -> list[int]:
    """The line on which each item of the list at `start` begins; zeros if that can't be found out."""
    decoder, blank = json.JSONDecoder(), re.compile(r"[\s,\[]*")
    lines: list[int] = []
    place, line, counted = start, 1, 0
    try:
        while len(lines) < count:
            between = blank.match(text, place)
            place = between.end() if between else place
            line += text.count("\n", counted, place)
            counted = place
            lines.append(line)
            _, place = decoder.raw_decode(text, place)
    except json.JSONDecodeError:
        return [0] * count
    return lines


def _parquet(path: Path) -> Iterator[Row | Broken]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(BATCH):
                for fields in rows_of(batch):
                    number += 1
                    yield Row(f"{path}: row {number}", fields)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError, KeyError) as error:
        yield Broken(str(path), f"not a readable Parquet file: {error}")


def rows_of(batch: Any) -> list[dict[str, Any]]:
    """The rows of a record batch. Maps become dictionaries, as JSON has them.

    Raises:
        KeyError: a map has a key twice.
    """
    rows: list[dict[str, Any]] = batch.to_pylist(maps_as_pydicts="strict")
    return rows


READERS: dict[str, Callable[[Path], Iterator[Row | Broken]]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json,
    ".csv": read_csv,
    ".tsv": read_tsv,
    ".parquet": _parquet,
    SHEETS: read_sheet,
    **dict.fromkeys(TEXTS, lambda path: read_text_file(path, "paragraph")),
}


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", type(None): "null", bool: "a boolean"}
    return names.get(type(value), "a number")
