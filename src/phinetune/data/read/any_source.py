"""Reads the rows of any data source, each with its place, and reports the places where no row can be read."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator
from pathlib import Path

from phinetune.data.read.datasets_library import number_rows, open_dataset
from phinetune.data.read.files import READERS, read_file, unknown_kind
from phinetune.data.read.folders import is_folder_of_files, scan_folder
from phinetune.data.read.held_data import held_rows, is_held_name, why_gone
from phinetune.data.read.packed import kind_of
from phinetune.data.read.row import Broken, Row
from phinetune.errors import DataError


def read_first(
    source: str, split: str, most: int | None, name: str | None = None, text_by: str = "paragraph"
) -> tuple[list[Row], list[str]]:
    """The first `most` rows, or all if `most` is None; and what is broken up to there, a sentence for each place.

    Raises:
        DataError: the source is missing, or a folder or hub id can't be loaded.
    """
    rows: list[Row] = []
    broken: list[str] = []
    items = scan_rows(source, split, name, text_by=text_by)
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
    source: str, split: str = "train", name: str | None = None, *, streaming: bool = False, text_by: str = "paragraph"
) -> Iterator[Row | Broken]:
    """The rows of a source and its broken places, in order.

    Args:
        name: the configuration of a folder or hub id; None is its only one, or the one it names default.
        streaming: of a hub id, read rows only when they are needed.
        text_by: what is a row of a text: `paragraph` or `tokens`.

    Raises:
        DataError: the source is missing or of an unknown kind, or a hub id can't be loaded.
    """
    problem = check_source(source)
    if problem:
        raise DataError(problem)
    held = held_rows(source)
    if held:
        return held.rows(split)
    path = Path(source).expanduser()
    if path.is_file():
        return read_file(path, name, text_by)
    if is_folder_of_files(path):
        return scan_folder(path, split, name, text_by)
    return number_rows(source, open_dataset(source, split, name, streaming=streaming))


def check_source(source: str) -> str | None:
    """What is wrong with a source, judged by its name and whether it exists; None if nothing is. A hub id is not
    looked up.
    """
    if is_held_name(source):
        return None if held_rows(source) else why_gone(source)
    path = Path(source).expanduser()
    if path.is_file():
        return unknown_kind(path)
    if path.is_dir() or (kind_of(path) not in READERS and re.fullmatch(r"[\w.-]+/[\w.-]+", source)):
        return None
    return f"{source}: no file has such a name" if is_pattern(source) else f"{source}: no such file"


def files_of_pattern(source: str) -> list[str]:
    """The files whose names a pattern such as `chats/*.jsonl` describes, sorted; any other source by itself.

    `**` is any number of folders. A pattern that no name fits stays, so that it is told.
    """
    if not is_pattern(source):
        return [source]
    found = sorted(name for name in glob.glob(os.path.expanduser(source), recursive=True) if os.path.isfile(name))
    return found or [source]


def is_pattern(source: str) -> bool:
    """Whether a source describes the names of files, and is no file or folder itself."""
    return any(sign in source for sign in "*?[") and not is_held_name(source) and not Path(source).expanduser().exists()
