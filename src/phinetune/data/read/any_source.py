"""Reads the rows of any data source, each with its place, and reports the places where no row can be read."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from phinetune.data.read.datasets_library import number_rows, open_dataset
from phinetune.data.read.files import READERS, read_file, unknown_kind
from phinetune.data.read.folders import is_folder_of_files, scan_folder
from phinetune.data.read.row import Broken, Row
from phinetune.errors import DataError


def read_first(source: str, split: str, most: int | None, name: str | None = None) -> tuple[list[Row], list[str]]:
    """The first `most` rows, or all if `most` is None; and what is broken up to there, a sentence for each place.

    Raises:
        DataError: the source is missing, or a folder or hub id can't be loaded.
    """
    rows: list[Row] = []
    broken: list[str] = []
    items = scan_rows(source, split, name)
    while most is None or len(rows) < most:
        item = next(items, None)
        if item is None:
            break
        if isinstance(item, Row):
            rows.append(item)
        else:
            broken.append(f"{item.where}: {item.problem}")
    return rows, broken


def scan_rows(
    source: str, split: str = "train", name: str | None = None, *, streaming: bool = False
) -> Iterator[Row | Broken]:
    """The rows of a source and its broken places, in order.

    Args:
        name: the configuration of a folder or hub id; None is its only one, or the one it names default.
        streaming: of a hub id, read rows only when they are needed.

    Raises:
        DataError: the source is missing or of an unknown kind, or a hub id can't be loaded.
    """
    problem = check_source(source)
    if problem:
        raise DataError(problem)
    path = Path(source).expanduser()
    if path.is_file():
        return read_file(path)
    if is_folder_of_files(path):
        return scan_folder(path, split, name)
    return number_rows(source, open_dataset(source, split, name, streaming=streaming))


def check_source(source: str) -> str | None:
    """What is wrong with a source, judged by its name and whether it exists; None if nothing is. A hub id is not
    looked up.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return unknown_kind(path)
    if path.is_dir() or (path.suffix.lower() not in READERS and re.fullmatch(r"[\w.-]+/[\w.-]+", source)):
        return None
    return f"{source}: no such file"
