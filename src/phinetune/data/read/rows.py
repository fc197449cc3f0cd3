"""Rows of a data source, each with the place it came from, and the places where there should be one and is none."""

from __future__ import annotations

import csv
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from phinetune.data.read.encodings import NotText, bad_place, decode_line, is_wide, lines_of, refuse_other_kinds
from phinetune.data.read.json_text import TOO_DEEP, is_deep, load_json
from phinetune.errors import DataError, at_most

BATCH = 1024  # rows of a Parquet file held at a time
PACKED = (".gz", ".zip", ".zst", ".bz2", ".xz", ".7z", ".tar", ".tgz")


class Row(NamedTuple):
    """One record and where it stands, for example `chats.jsonl:17`."""

    where: str
    fields: dict[str, Any]


class Broken(NamedTuple):
    """A place that holds no row one can read, and why; `salvaged` is the row that it looks like."""

    where: str
    problem: str
    kind: Literal["broken", "encoding"] = "broken"
    salvaged: dict[str, Any] | None = None


def read_rows(source: str, split: str = "train") -> list[Row]:
    """Rows of a file, a folder that `datasets` can load, or a hub id.

    Raises:
        DataError: not there, not readable, or broken; broken JSON Lines are listed with their lines.
    """
    rows, broken = read_first(source, split, None)
    if broken:
        raise DataError(at_most(broken))
    return rows


def read_first(source: str, split: str, most: int | None) -> tuple[list[Row], list[str]]:
    """The first `most` rows, all if that is None, and what is broken up to there.

    Raises:
        DataError: not there, or a folder or hub id that can't be loaded.
    """
    rows: list[Row] = []
    broken: list[str] = []
    found = scan_rows(source, split)
    while most is None or len(rows) < most:
        one = next(found, None)
        if one is None:
            break
        if isinstance(one, Row):
            rows.append(one)
        else:
            broken.append(f"{one.where}: {one.problem}")
    return rows, broken


def scan_rows(source: str, split: str = "train") -> Iterator[Row | Broken]:
    """Rows of a source and its broken places, in order.

    Raises:
        DataError: not there, or a hub id that can't be loaded.
    """
    problem = check_source(source)
    if problem:
        raise DataError(problem)
    path = Path(source).expanduser()
    if path.is_dir():
        return _dataset_folder(path, split)
    return _file(path) if path.is_file() else number_rows(source, open_dataset(source, split))


def _file(path: Path) -> Iterator[Row | Broken]:
    try:
        kind = path.suffix.lower()
        refuse_other_kinds(path)
        if kind in (".json", ".csv") and is_wide(path):
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


def check_source(source: str) -> str | None:
    """What is wrong with a source as far as a glance can tell, or None. A hub id is not looked up."""
    path = Path(source).expanduser()
    if path.is_file():
        kind = path.suffix.lower()
        hint = "; unpack it first" if kind in PACKED else ""
        return None if kind in READERS else f"{path}: unknown kind of file{hint}; known: {', '.join(READERS)}"
    if path.is_dir() or (path.suffix.lower() not in READERS and re.fullmatch(r"[\w.-]+/[\w.-]+", source)):
        return None
    return f"{source}: no such file"


def _json_lines(path: Path) -> Iterator[Row | Broken]:
    # A list under the name of JSON Lines is read as what it is.
    return _json(path) if is_list(path) else read_lines(path, lines_of(path))


def is_list(path: Path) -> bool:
    """Whether a file holds a JSON list, whatever its name says."""
    with path.open("rb") as file:
        listed = file.read(64).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")
    return listed and not is_wide(path)


def read_lines(path: Path, lines: Iterable[tuple[int, bytes | str]]) -> Iterator[Row | Broken]:
    """The rows of numbered lines of JSON."""
    for number, raw in lines:
        line, problem = decode_line(raw)
        where = f"{path}:{number}"
        if line is None:
            yield Broken(where, problem or "", "encoding")
            continue
        if not line.strip():
            continue
        fields, trouble = _load(line.rstrip("\r\n"))
        if trouble:
            yield Broken(where, trouble)
        elif not isinstance(fields, dict):
            yield Broken(where, f"expected a JSON object, found {_kind(fields)}")
        elif problem:
            yield Broken(where, problem, "encoding", fields)
        else:
            yield Row(where, fields)


def _load(text: str) -> tuple[Any, str | None]:
    """The value, or what is wrong with the JSON."""
    try:
        return load_json(text), None
    except ValueError as error:
        return None, f"broken JSON: {error}"


def _json(path: Path) -> Iterator[Row | Broken]:
    text = path.read_text(encoding="utf-8-sig")
    try:
        tree = json.loads(text)
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
    start = 0
    if isinstance(tree, dict):
        lists = {k: v for k, v in tree.items() if isinstance(v, list) and v and isinstance(v[0], dict)}
        wrapped = len(lists) == 1 and "messages" not in tree and "conversations" not in tree
        key, tree = next(iter(lists.items())) if wrapped else ("", [tree])
        found = re.search(rf"{re.escape(json.dumps(key))}\s*:\s*\[", text) if wrapped else None
        start = found.end() - 1 if found else 0
    if not isinstance(tree, list):
        yield Broken(str(path), f"expected a list of objects, found {_kind(tree)}")
        return
    lines = _lines_of_items(text, start, len(tree))
    for number, (line, fields) in enumerate(zip(lines, tree, strict=True), 1):
        where = f"{path}:{line}: row {number}" if line else f"{path}: row {number}"
        if not isinstance(fields, dict):
            yield Broken(where, f"expected an object, found {_kind(fields)}")
        else:
            yield Broken(where, TOO_DEEP) if is_deep(fields) else Row(where, fields)


def _lines_of_items(text: str, start: int, count: int) -> list[int]:
    """The line on which each item of the list at `start` begins; zeros where that can't be told."""
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
        reader = csv.DictReader(file, strict=True)
        line = 1
        try:
            problem = _other_separator(reader.fieldnames or [])
            if problem:
                yield Broken(f"{path}:1", problem)
                return
            line = reader.line_num + 1
            for fields in reader:
                if fields.pop(None, None) is not None:
                    yield Broken(f"{path}:{line}", "more cells than the header has columns")
                else:
                    yield Row(f"{path}:{line}", {k: v for k, v in fields.items() if v not in (None, "")})
                line = reader.line_num + 1
        except csv.Error as error:
            yield Broken(f"{path}:{line}", f"broken CSV: {error}")


def _other_separator(header: Sequence[str]) -> str | None:
    sign = next((sign for sign in ";\t|" if sign in "".join(header)), None) if len(header) == 1 else None
    name = {";": "semicolons", "\t": "tabs", "|": "bars"}.get(sign or "")
    return f"the columns are set apart by {name}; save the file with commas" if name else None


def _parquet(path: Path) -> Iterator[Row | Broken]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(BATCH):
                for fields in batch.to_pylist():
                    number += 1
                    yield Row(f"{path}: row {number}", fields)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        yield Broken(str(path), f"not a readable Parquet file: {error}")


READERS: dict[str, Callable[[Path], Iterator[Row | Broken]]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json,
    ".csv": _csv,
    ".parquet": _parquet,
}


def open_dataset(source: str, split: str, *, streaming: bool = False) -> Any:
    """The split of a folder that `datasets` can load, or of a hub id; with `streaming`, read as it is asked for.

    Raises:
        DataError: it can't be loaded, or has no such split.
    """
    path = Path(source).expanduser()
    return _folder(path, split, streaming) if path.is_dir() else _hub(source, split, streaming)


class _Unloadable(DataError):
    """A folder that `datasets` can't load."""


def _folder(path: Path, split: str, streaming: bool) -> Any:
    import datasets

    saved = any((path / name).is_file() for name in ("state.json", "dataset_dict.json"))
    try:
        data = (
            datasets.load_from_disk(str(path))
            if saved
            else datasets.load_dataset(str(path), split=split, streaming=streaming)
        )
    except (ValueError, OSError, FileNotFoundError, datasets.exceptions.DatasetsError) as error:
        problem = " ".join(str(error.__cause__ or error).split())
        raise _Unloadable(f"not a folder that `datasets` can load: {problem}") from error
    return _pick_split(str(path), data, split)


def _dataset_folder(path: Path, split: str) -> Iterator[Row | Broken]:
    try:
        return number_rows(str(path), open_dataset(str(path), split))
    except _Unloadable as error:
        return _broken_folder(path, str(error))


def _broken_folder(path: Path, problem: str) -> Iterator[Row | Broken]:
    """What stands in the way of `datasets`, and what its files hold, each read by itself to find the place."""
    yield Broken(str(path), problem)
    for file in sorted(path.rglob("*")):
        if file.is_file() and file.suffix.lower() in READERS:
            yield from _file(file)


def _hub(source: str, split: str, streaming: bool) -> Any:
    import datasets
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return datasets.load_dataset(source, split=split, streaming=streaming)
    except (ValueError, OSError, HfHubHTTPError, datasets.exceptions.DatasetsError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(f"{source}: no such file, and not to be had from the hub as a data set ({first})") from error


def _pick_split(where: str, data: Any, split: str) -> Any:
    if not isinstance(data, dict):
        return data
    if split not in data:
        raise DataError(f"{where}: there is no split `{split}`; there are {', '.join(data)} (data.split)")
    return data[split]


def number_rows(where: str, data: Any) -> Iterator[Row]:
    """The rows of a data set of `datasets`."""
    return (Row(f"{where}: row {number}", dict(fields)) for number, fields in enumerate(data, 1))


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", type(None): "null", bool: "a boolean"}
    return names.get(type(value), "a number")
