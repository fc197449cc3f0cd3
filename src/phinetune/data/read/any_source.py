"""Reads the rows of any data source, each with its place, and reports the places where no row can be read."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from phinetune.data.read.datasets_library import number_rows, open_dataset, read_folder
from phinetune.data.read.files import READERS, read_file
from phinetune.data.read.row import Broken, Row
from phinetune.errors import DataError

PACKED = (".gz", ".zip", ".zst", ".bz2", ".xz", ".7z", ".tar", ".tgz")


def read_first(source: str, split: str, most: int | None) -> tuple[list[Row], list[str]]:
    """The first `most` rows, or all if `most` is None; and what is broken up to there, a sentence for each place.

    Raises:
        DataError: the source is missing, or a folder or hub id can't be loaded.
    """
    rows: list[Row] = []
    broken: list[str] = []
    items = scan_rows(source, split)
    while most is None or len(rows) < most:
        item = next(items, None)
        if item is None:
            break
        if isinstance(item, Row):
            rows.append(item)
        else:
            broken.append(f"{item.where}: {item.problem}")
    return rows, broken


def scan_rows(source: str, split: str = "train") -> Iterator[Row | Broken]:
    """The rows of a source and its broken places, in order.

    Raises:
        DataError: the source is missing or of an unknown kind, or a hub id can't be loaded.
    """
    problem = check_source(source)
    if problem:
        raise DataError(problem)
    path = Path(source).expanduser()
    if path.is_dir():
        return read_folder(path, split)
    return read_file(path) if path.is_file() else number_rows(source, open_dataset(source, split))


def check_source(source: str) -> str | None:
    """What is wrong with a source, judged by its name and whether it exists; None if nothing is. A hub id is not
    looked up.
    """
    path = Path(source).expanduser()
    if path.is_file():
        kind = path.suffix.lower()
        hint = "; unpack it first" if kind in PACKED else ""
        return None if kind in READERS else f"{path}: unknown kind of file{hint}; known: {', '.join(READERS)}"
    if path.is_dir() or (path.suffix.lower() not in READERS and re.fullmatch(r"[\w.-]+/[\w.-]+", source)):
        return None
    return f"{source}: no such file"
