"""Reads a folder of data files: each file as if it were alone. `datasets` would read dates and numbers in its own way.

Which files belong to which split is decided as `datasets` does: by the words train, validation and test in the names
of files and folders, or by the list in the folder's README.md.
"""

from __future__ import annotations

import itertools
import logging
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from phinetune.data.read.files import READERS, TEXTS, read_file, unknown_kind
from phinetune.data.read.packed import PACKED, kind_of
from phinetune.data.read.row import Broken, Row
from phinetune.errors import DataError

logger = logging.getLogger(__name__)

ABOUT = re.compile(
    r"(readme|licen[cs]e|notice|changelog|requirements|citation)\b", re.IGNORECASE
)  # texts about the data
SAVED = ("state.json", "dataset_dict.json")  # files of a data set that `datasets` saved
TABLES = (".arrow", ".xls", ".feather", ".orc", ".avro")  # data that nothing here reads


def is_folder_of_files(source: str | Path) -> bool:
    """Whether a source is a folder of data files. A data set that `datasets` saved is none."""
    path = Path(source).expanduser()
    if any((path / name).is_file() for name in SAVED):
        return False
    return any(kind_of(file) in READERS and not _is_about(file) for file in visible_files(path))


def visible_files(folder: Path) -> Iterator[Path]:
    """The files in a folder and in its folders that `datasets` does not take for hidden or its own."""
    for file in folder.rglob("*"):
        hidden = any(part.startswith((".", "__")) for part in file.relative_to(folder).parts)
        if file.is_file() and not hidden and file.name not in ("dataset_infos.json", "dataset_info.json"):
            yield file


def scan_folder(path: Path, split: str, name: str | None = None, text_by: str = "paragraph") -> Iterator[Row | Broken]:
    """The rows and the broken places of a split, file by file.

    Args:
        split: a split's name, or parts of splits as `datasets` writes them (`train[:10%]`, `train+test`).
        name: of a configuration that the folder's README.md lists.
        text_by: see `read_file`.

    Raises:
        DataError: see `files_by_split`; or the folder has no such split.
    """
    splits = files_by_split(path, name)
    _name_files_left_out(path, splits)
    if is_name(split):
        return _scan_files(files_of(path, splits, split), text_by)
    return itertools.chain.from_iterable(
        itertools.islice(_scan_files(splits[part.splitname], text_by), part.from_, part.to)
        for part in _parts(path, splits, split)
    )


def is_name(split: str) -> bool:
    """Whether this is a split's name, and not an expression for parts of splits."""
    return not set(split) & set("[]+()")


def files_of(path: Path, splits: dict[str, list[Path]], split: str) -> list[Path]:
    """The files of a split.

    Raises:
        DataError: the folder has no such split.
    """
    if split not in splits:
        raise DataError(f"{path}: there is no split `{split}`; there are {', '.join(splits)} (data.split)")
    return splits[split]


def _scan_files(files: Sequence[Path], text_by: str = "paragraph") -> Iterator[Row | Broken]:
    return itertools.chain.from_iterable(read_file(file, text_by=text_by) for file in files)


def _parts(path: Path, splits: dict[str, list[Path]], split: str) -> list[Any]:
    """The parts of splits that an expression means, each with `splitname`, `from_` and `to`."""
    from datasets import ReadInstruction

    counts = {name: sum(1 for _ in _scan_files(files)) for name, files in splits.items()}
    try:
        return list(ReadInstruction.from_spec(split).to_absolute(counts))
    except (ValueError, AssertionError) as error:
        raise DataError(f"{path}: `{split}` is no part of the splits {', '.join(splits)} (data.split)") from error


def files_by_split(path: Path, name: str | None = None) -> dict[str, list[Path]]:
    """The data files of a folder, by split.

    Raises:
        DataError: the folder holds data that can't be read (the error lists all such files), or its README.md lists
            files that are not there.
    """
    found = {split: list(filter(_is_data, files)) for split, files in _by_datasets(path, name).items()}
    tables = {split: [file for file in files if kind_of(file) not in TEXTS] for split, files in found.items()}
    if any(tables.values()):  # beside them, a text is a note about them
        found = tables
    unknown = [unknown_kind(file) for file in dict.fromkeys(itertools.chain.from_iterable(found.values()))]
    if any(unknown):
        raise DataError([f"{problem}; or move it out of the folder" for problem in unknown if problem])
    return {split: files for split, files in found.items() if files}


def _name_files_left_out(path: Path, splits: dict[str, list[Path]]) -> None:
    """Tell of data files in no split: where some names have a split's word, `datasets` passes the others over."""
    read = set(itertools.chain.from_iterable(splits.values()))
    texts = any(kind_of(file) in TEXTS for file in read)
    data = {file for file in visible_files(path) if _is_data(file) and (texts or kind_of(file) not in TEXTS)}
    left = sorted(data - read)
    if left and not _lists_files(path):
        names = ", ".join(map(str, left))
        logger.warning("%s: in none of the splits %s, so not read: %s", path, ", ".join(splits), names)


def _is_data(file: Path) -> bool:
    return kind_of(file) in (*READERS, *PACKED, *TABLES) and not _is_about(file)


def _is_about(file: Path) -> bool:
    """Whether a text tells of the data, as a README does, and is none."""
    return kind_of(file) in TEXTS and ABOUT.match(file.name) is not None


def _by_datasets(path: Path, name: str | None) -> dict[str, list[Path]]:
    """The files of a folder by split, as `datasets` finds them."""
    import datasets
    from datasets.data_files import DataFilesDict, get_data_patterns

    base = path.resolve()
    try:
        if _lists_files(path):
            found = datasets.load_dataset_builder(str(base), name).config.data_files
        elif name:
            raise ValueError(f"there is no configuration `{name}`, since its README.md lists none (data.name)")
        else:
            found = DataFilesDict.from_patterns(get_data_patterns(str(base)), base_path=str(base))
    except (ValueError, OSError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"{path}: {' '.join(str(error).split())}") from error
    return {str(split): [path / os.path.relpath(file, base) for file in files] for split, files in found.items()}


def _lists_files(path: Path) -> bool:
    """Whether the folder's README.md says which files, or which folder's, belong to which configuration and split."""
    card = path / "README.md"
    if not card.is_file():
        return False
    text = card.read_text(encoding="utf-8", errors="replace")
    return "data_files:" in text or "data_dir:" in text
