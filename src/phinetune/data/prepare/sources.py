"""The sources that a configuration names: those to train on with their weights, and those of held-out chats."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from phinetune.config.data import DataSection, OtherSplit
from phinetune.data.prepare.named_sources import name_sources, weighted
from phinetune.data.prepare.stream import check_stream
from phinetune.data.read.any_source import check_source
from phinetune.data.read.files import has_sheets
from phinetune.data.read.folders import files_by_split, is_folder_of_files
from phinetune.data.read.held_data import held_rows
from phinetune.data.read.row_mapping import RowMapping
from phinetune.errors import ConfigError, DataError


def held_out_section(section: DataSection) -> DataSection | None:
    """The section with the held-out chats as its `train`; None if they are no source, but a share or none at all."""
    return None if isinstance(section.eval, float) else _other_section(section, section.eval)


def test_section(section: DataSection) -> DataSection | None:
    """The section with the chats of the final verdict as its `train`; None if there are none."""
    return _other_section(section, section.test)


def _other_section(section: DataSection, given: Any) -> DataSection | None:
    if given is None:
        return None
    changes = {"train": given, "eval": None, "test": None, "limit": None}
    if isinstance(given, OtherSplit):
        changes["train"] = given.path or [path for path, _ in weighted(section.train)]
        changes |= {"split": given.split or section.split, "name": given.name or section.name}
    return section.model_copy(update=changes)


def name_held_out(section: DataSection) -> str:
    """The sources of held-out chats in one line; a split that is not the one to train on is named, too."""
    return _name_other(held_out_section(section), section.eval)


def name_test(section: DataSection) -> str:
    """The sources of the chats of the final verdict in one line."""
    return _name_other(test_section(section), section.test)


def _name_other(held_out: DataSection | None, given: Any) -> str:
    if held_out is None:
        return ""
    parts = [part for part in (held_out.name, held_out.split) if part]
    more = f" ({', '.join(parts)})" if isinstance(given, OtherSplit) else ""
    return f"{name_sources(held_out.train)}{more}"


def check_sources(section: DataSection) -> None:
    """Make sure that the sources exist, before anything slow begins.

    Raises:
        DataError: no training file is given, or sources are missing or of an unknown kind; the error lists all of them.
        ConfigError: the section asks for a stream and for something that a stream can't give, or it holds out the very
            rows that are trained on.
    """
    if section.train is None:
        raise DataError("data.train: no file given; set it to a file of chats")
    if section.streaming:
        check_stream(section)
    RowMapping.of(section)  # a function that no program holds is told now
    others = {"eval": held_out_section(section), "test": test_section(section)}
    check_there([path for one in (section, *others.values()) if one for path, _ in weighted(one.train)])
    problems = _of_files(section, others)
    if problems:
        raise ConfigError(problems)
    _check_apart(section, others)


def check_there(sources: Sequence[str]) -> None:
    """Make sure that sources exist.

    Raises:
        DataError: sources are missing or of an unknown kind; the error lists all of them.
    """
    problems = [problem for path in dict.fromkeys(sources) if (problem := check_source(path))]
    if problems:
        raise DataError(problems)


def _of_files(section: DataSection, others: Mapping[str, DataSection | None]) -> list[str]:
    """What a file, or rows in memory, are asked for that only a data set has: a configuration, or another split."""
    problems = []
    if section.name:
        problems += [
            f"data.name: {what}, which has no configurations; leave the key out" for what in _files(section, "name")
        ]
    if section.split != "train":
        problems += [f"data.split: {what}, which has no splits; leave the key out" for what in _files(section, "split")]
    for key, other in others.items():
        given = getattr(section, key)
        if other and isinstance(given, OtherSplit) and (given.split or given.name):
            tenth = "write `eval: 0.1` to hold a tenth of the rows out, or " if key == "eval" else ""
            problems += [
                f"data.{key}: {what}, which has neither splits nor configurations; {tenth}name another file"
                for what in _files(other, "split" if given.split else "name")
            ]
    return problems


def _files(section: DataSection, key: str) -> list[str]:
    """The sources that have no splits, or no configurations (`key`: "split" or "name"), with what each is."""
    found = []
    for path, _ in weighted(section.train):
        held = held_rows(path)
        if held:
            found += [f"{path} is in memory"] if key == "name" or not held.has_splits else []
        elif Path(path).expanduser().is_file() and not (key == "name" and has_sheets(Path(path))):
            found.append(f"{path} is a file")
    return found


def _check_apart(section: DataSection, others: Mapping[str, DataSection | None]) -> None:
    """Make sure that no source is trained on and held out, nor held out and the final verdict."""
    trained = {identity(path, section) for path, _ in weighted(section.train)}
    problems, held_out = [], set()
    for key, other in others.items():
        if other is None:
            continue
        for path, _ in weighted(other.train):
            if identity(path, other) in trained:
                problems.append(_apart_sentence(path, section, key))
            elif identity(path, other) in held_out:
                problems.append(f"data.test: {path} is data.eval, too; the verdict needs chats that guided nothing")
            held_out.add(identity(path, other))
    if problems:
        raise ConfigError(problems)


def identity(path: str, section: DataSection) -> tuple[str | None, ...]:
    """What tells the rows of a source from those of another. Several spellings of a path are one source."""
    place = Path(path).expanduser()
    if place.is_file():
        return (str(place.resolve()), *([section.name] if has_sheets(place) else []))
    return (str(place.resolve()) if place.exists() else path.casefold(), section.split, section.name)


def _apart_sentence(path: str, section: DataSection, key: str) -> str:
    place, held = Path(path).expanduser(), held_rows(path)
    tenth = "write `eval: 0.1` to hold a tenth of it out, or " if key == "eval" else ""
    if held and not held.has_splits:
        return f"data.{key}: {path}: these are the rows that are trained on; {tenth}give other rows"
    if place.is_file():
        return f"data.{key}: {path} is the file that is trained on; {tenth}name another file"
    others = [split for split in (held.splits if held else _splits(place)) if split != section.split]
    known = f"; there are the splits {', '.join(others)}" if others else ""
    example = others[0] if others else "validation"
    this = ", or `eval: 0.1` to hold a tenth of this one out" if key == "eval" else ""
    return (
        f"data.{key}: the split `{section.split}` of {path} is trained on; write `{key}: {{split: {example}}}` for "
        f"another split{this}{known}"
    )


def _splits(folder: Path) -> list[str]:
    """The splits of a folder, as far as its files say so; of a hub id none."""
    if is_folder_of_files(folder):
        return list(files_by_split(folder))
    try:
        return list(json.loads((folder / "dataset_dict.json").read_text(encoding="utf-8"))["splits"])
    except (OSError, ValueError, KeyError, TypeError):
        return []
