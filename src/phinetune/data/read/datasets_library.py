"""Rows of a folder that `datasets` can load, or of a hub id."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from phinetune.data.read.row import Row
from phinetune.errors import DataError, first_line


def open_dataset(source: str, split: str, name: str | None = None, *, streaming: bool = False) -> Any:
    """A split of a folder that `datasets` can load, or of a hub id.

    Args:
        name: its configuration; None is its only one, or the one it names default.
        streaming: read rows only when they are needed.

    Raises:
        DataError: the source can't be loaded, or has no such split.
    """
    path = Path(source).expanduser()
    return _folder(path, split, name, streaming) if path.is_dir() else _hub(source, split, name, streaming)


def _folder(path: Path, split: str, name: str | None, streaming: bool) -> Any:
    import datasets

    saved = any((path / file).is_file() for file in ("state.json", "dataset_dict.json"))
    if saved and name:
        raise DataError(f"{path}: a saved data set has no configurations; leave data.name out")
    try:
        data = (
            datasets.load_from_disk(str(path))
            if saved
            else datasets.load_dataset(str(path), name, split=split, streaming=streaming)
        )
    except (ValueError, OSError, FileNotFoundError, datasets.exceptions.DatasetsError) as error:
        problem = " ".join(str(error.__cause__ or error).split())
        raise DataError(f"{path}: not a folder that `datasets` can load: {problem}") from error
    # A saved set may remember that its rows are to be arrays of NumPy or torch.
    return _pick_split(str(path), data, split).with_format(None)


def _hub(source: str, split: str, name: str | None, streaming: bool) -> Any:
    import datasets
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return datasets.load_dataset(source, name, split=split, streaming=streaming)
    except (ValueError, OSError, HfHubHTTPError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"{source}: no such file, and can't be loaded from the hub as a data set ({first_line(error)})"
        ) from error


def _pick_split(where: str, data: Any, split: str) -> Any:
    if not isinstance(data, dict):
        return data
    if split not in data:
        raise DataError(f"{where}: there is no split `{split}`; there are {', '.join(data)} (data.split)")
    return data[split]


def number_rows(where: str, data: Any) -> Iterator[Row]:
    """The rows of a data set of `datasets`. Row numbers begin at 1."""
    return (Row(f"{where}: row {number}", dict(fields)) for number, fields in enumerate(data, 1))
