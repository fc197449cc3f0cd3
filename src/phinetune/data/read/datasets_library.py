"""Rows of a folder that `datasets` can load, or of a hub id."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from phinetune.data.read.files import READERS, read_file
from phinetune.data.read.row import Broken, Row
from phinetune.errors import DataError


def open_dataset(source: str, split: str, *, streaming: bool = False) -> Any:
    """A split of a folder that `datasets` can load, or of a hub id.

    Args:
        streaming: read rows only when they are needed.

    Raises:
        DataError: the source can't be loaded, or has no such split.
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


def read_folder(path: Path, split: str) -> Iterator[Row | Broken]:
    try:
        return number_rows(str(path), open_dataset(str(path), split))
    except _Unloadable as error:
        return _broken_folder(path, str(error))


def _broken_folder(path: Path, problem: str) -> Iterator[Row | Broken]:
    """Why `datasets` can't load a folder, then the rows and broken places of each file in it. They show the line."""
    yield Broken(str(path), problem)
    for file in sorted(path.rglob("*")):
        if file.is_file() and file.suffix.lower() in READERS:
            yield from read_file(file)


def _hub(source: str, split: str, streaming: bool) -> Any:
    import datasets
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return datasets.load_dataset(source, split=split, streaming=streaming)
    except (ValueError, OSError, HfHubHTTPError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(f"{source}: no such file, and can't be loaded from the hub as a data set ({reason})") from error


def _pick_split(where: str, data: Any, split: str) -> Any:
    if not isinstance(data, dict):
        return data
    if split not in data:
        raise DataError(f"{where}: there is no split `{split}`; there are {', '.join(data)} (data.split)")
    return data[split]


def number_rows(where: str, data: Any) -> Iterator[Row]:
    """The rows of a data set of `datasets`. Row numbers begin at 1."""
    return (Row(f"{where}: row {number}", dict(fields)) for number, fields in enumerate(data, 1))
