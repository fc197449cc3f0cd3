"""Rows of a data source, each with the place it came from."""

from __future__ import annotations

import csv
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from phinetune.errors import DataError, at_most


class Row(NamedTuple):
    """One record and where it stands, for example `chats.jsonl:17`."""

    where: str
    fields: dict[str, Any]


def read_rows(source: str, split: str = "train") -> Iterator[Row]:
    """Rows of a file, a folder that `datasets` can load, or a hub id.

    Raises:
        DataError: not there, not readable, or broken; broken JSON Lines are listed with their lines.
    """
    problem = check_source(source)
    if problem:
        raise DataError(problem)
    path = Path(source).expanduser()
    if path.is_dir():
        return _dataset_folder(path, split)
    if not path.is_file():
        return _hub(source, split)
    try:
        return READERS[path.suffix.lower()](path)
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8") from None


def check_source(source: str) -> str | None:
    """What is wrong with a source as far as a glance can tell, or None. A hub id is not looked up."""
    path = Path(source).expanduser()
    if path.is_file():
        known = path.suffix.lower() in READERS
        return None if known else f"{path}: unknown kind of file; known: {', '.join(READERS)}"
    if path.is_dir() or (path.suffix.lower() not in READERS and re.fullmatch(r"[\w.-]+/[\w.-]+", source)):
        return None
    return f"{source}: no such file"


def _json_lines(path: Path) -> Iterator[Row]:
    rows, problems = [], []
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                fields = json.loads(line)
            except json.JSONDecodeError as error:
                problems.append(f"{path}:{number}: broken JSON: {error.msg} (column {error.colno})")
                continue
            if not isinstance(fields, dict):
                problems.append(f"{path}:{number}: expected a JSON object, found {_kind(fields)}")
                continue
            rows.append(Row(f"{path}:{number}", fields))
    if problems:
        raise DataError(at_most(problems))
    return iter(rows)


def _json(path: Path) -> Iterator[Row]:
    text = path.read_text(encoding="utf-8-sig")
    try:
        tree = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and error.pos and text[: error.pos].rstrip().endswith("}"):
            return _json_lines(path)  # JSON Lines under the wrong name
        raise DataError(f"{path}:{error.lineno}: broken JSON: {error.msg} (column {error.colno})") from None
    if isinstance(tree, dict):
        lists = [value for value in tree.values() if isinstance(value, list) and value and isinstance(value[0], dict)]
        tree = lists[0] if len(lists) == 1 and "messages" not in tree and "conversations" not in tree else [tree]
    if not isinstance(tree, list):
        raise DataError(f"{path}: expected a list of objects, found {_kind(tree)}")
    problems = [
        f"{path}: row {i}: expected an object, found {_kind(r)}"
        for i, r in enumerate(tree, 1)
        if not isinstance(r, dict)
    ]
    if problems:
        raise DataError(at_most(problems))
    return (Row(f"{path}: row {number}", fields) for number, fields in enumerate(tree, 1))


def _csv(path: Path) -> Iterator[Row]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        rows, line = [], 2
        try:
            for fields in reader:
                if fields.pop(None, None) is not None:
                    raise DataError(f"{path}:{line}: more cells than the header has columns")
                rows.append(Row(f"{path}:{line}", {k: v for k, v in fields.items() if v not in (None, "")}))
                line = reader.line_num + 1
        except csv.Error as error:
            raise DataError(f"{path}:{line}: broken CSV: {error}") from None
    return iter(rows)


def _parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise DataError(f"{path}: not a readable Parquet file: {error}") from None
    return (Row(f"{path}: row {number}", fields) for number, fields in enumerate(table.to_pylist(), 1))


READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json,
    ".csv": _csv,
    ".parquet": _parquet,
}


def _dataset_folder(path: Path, split: str) -> Iterator[Row]:
    import datasets

    saved = any((path / name).is_file() for name in ("state.json", "dataset_dict.json"))
    try:
        data = datasets.load_from_disk(str(path)) if saved else datasets.load_dataset(str(path), split=split)
    except (ValueError, OSError, FileNotFoundError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"{path}: not a folder that `datasets` can load: {error}") from error
    return _number(str(path), _pick_split(str(path), data, split))


def _hub(source: str, split: str) -> Iterator[Row]:
    import datasets
    from huggingface_hub.errors import HfHubHTTPError

    try:
        data = datasets.load_dataset(source, split=split)
    except (ValueError, OSError, HfHubHTTPError, datasets.exceptions.DatasetsError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(f"{source}: no such file, and not to be had from the hub as a data set ({first})") from error
    return _number(source, data)


def _pick_split(where: str, data: Any, split: str) -> Any:
    if not isinstance(data, dict):
        return data
    if split not in data:
        raise DataError(f"{where}: there is no split `{split}`; there are {', '.join(data)} (data.split)")
    return data[split]


def _number(where: str, data: Any) -> Iterator[Row]:
    return (Row(f"{where}: row {number}", dict(fields)) for number, fields in enumerate(data, 1))


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", type(None): "null", bool: "a boolean"}
    return names.get(type(value), "a number")
