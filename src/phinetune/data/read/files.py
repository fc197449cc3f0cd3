"""Rows of a file, each with its place: JSON Lines, JSON, CSV, Parquet."""

from __future__ import annotations

import csv
import json
import logging
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
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
from phinetune.data.read.row import Broken, Row
from phinetune.data.read.safe_json import TOO_DEEP, first_twin, is_deep, load_json, load_with_twins

logger = logging.getLogger(__name__)

PACKED = (".gz", ".zip", ".zst", ".bz2", ".xz", ".7z", ".tar", ".tgz")
MISSING: Any = object()  # stands where a row of a CSV file has no cell
BATCH = 1024  # rows of a Parquet file in memory at a time


def unknown_kind(path: Path) -> str | None:
    """What is wrong with the kind of a file, judged by its name; None if it can be read."""
    kind = path.suffix.lower()
    hint = "; unpack it first" if kind in PACKED else ""
    return None if kind in READERS else f"{path}: unknown kind of file{hint}; known: {', '.join(READERS)}"


def read_file(path: Path) -> Iterator[Row | Broken]:
    try:
        kind = path.suffix.lower()
        refuse_other_kinds(path)
        if kind in (".json", ".csv") and is_utf16_or_utf32(path):
            line, problem = bad_place(path)
            yield Broken(f"{path}:{line}", problem, "encoding")
            return
        yield from READERS[kind](path)
    except NotText as error:
        yield Broken(f"{path}:{error.line}", str(error))
    except UnicodeDecodeError:
        line, problem = bad_place(path)
        yield Broken(f"{path}:{line}", problem, "encoding")
    except OSError as error:
        yield Broken(str(path), f"can't be read: {error.strerror or error}")


def _json_lines(path: Path) -> Iterator[Row | Broken]:
    # A file with the name of JSON Lines may hold one JSON list.
    return _json(path) if is_list(path) else read_lines(path, lines_of(path))


def is_list(path: Path) -> bool:
    """Whether a file holds one JSON list, whatever its name says."""
    with path.open("rb") as file:
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
    text = path.read_text(encoding="utf-8-sig")
    try:
        tree, twins = load_with_twins(text)
    except json.JSONDecodeError as error:
        by_line = path.suffix.lower() != ".json" or text[: error.pos].rstrip().endswith("}")
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


def _csv(path: Path) -> Iterator[Row | Broken]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True, restval=MISSING)
        line = 1
        try:
            problem = _other_separator(reader.fieldnames or []) or _named_twice(reader.fieldnames or [])
            if problem:
                yield Broken(f"{path}:1", problem)
                return
            line = reader.line_num + 1
            for fields in reader:
                if fields.pop(None, None) is not None:
                    yield Broken(f"{path}:{line}", "more cells than the header has columns")
                elif MISSING in fields.values():
                    yield Broken(f"{path}:{line}", "fewer cells than the header has columns")
                else:
                    yield Row(f"{path}:{line}", {k: v or None for k, v in fields.items()})
                line = reader.line_num + 1
        except csv.Error as error:
            yield Broken(f"{path}:{line}", f"broken CSV: {error}")


def _other_separator(header: Sequence[str]) -> str | None:
    sign = next((sign for sign in ";\t|" if sign in "".join(header)), None) if len(header) == 1 else None
    name = {";": "semicolons", "\t": "tabs", "|": "bars"}.get(sign or "")
    return f"the columns are set apart by {name}; save the file with commas" if name else None


def _named_twice(header: Sequence[str]) -> str | None:
    twice = [name for name, count in Counter(header).items() if count > 1]
    return f"two columns are named `{twice[0]}`, and only one could be read; rename one" if twice else None


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
    ".csv": _csv,
    ".parquet": _parquet,
}


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", type(None): "null", bool: "a boolean"}
    return names.get(type(value), "a number")
