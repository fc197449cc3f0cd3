"""The sources that a configuration names: those to train on with their weights, and those of held-out chats."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from phinetune.config.data import DataSection, OtherSplit, WeightedFile
from phinetune.data.prepare.stream import check_stream
from phinetune.data.read.any_source import check_source
from phinetune.data.read.folders import files_by_split, is_folder_of_files
from phinetune.errors import ConfigError, DataError

Named = str | Sequence[str | WeightedFile] | None


def weighted(source: Named) -> list[tuple[str, float]]:
    """Each source and its weight, which is 1 if none is given."""
    entries = [source] if isinstance(source, str) else list(source or [])
    return [(entry, 1.0) if isinstance(entry, str) else (entry.path, entry.weight) for entry in entries]


def name_sources(source: Named) -> str:
    """The sources in one line, for example `a.jsonl, b.jsonl × 2`."""
    return ", ".join(path if weight == 1 else f"{path} × {weight:g}" for path, weight in weighted(source))


def held_out_section(section: DataSection) -> DataSection | None:
    """The section with the held-out chats as its `train`; None if they are no source, but a share or none at all."""
    given = section.eval
    if given is None or isinstance(given, float):
        return None
    changes = {"train": given, "eval": None, "limit": None}
    if isinstance(given, OtherSplit):
        changes["train"] = given.path or [path for path, _ in weighted(section.train)]
        changes |= {"split": given.split or section.split, "name": given.name or section.name}
    return section.model_copy(update=changes)


def name_held_out(section: DataSection) -> str:
    """The sources of held-out chats in one line; a split that is not the one to train on is named, too."""
    held_out = held_out_section(section)
    if held_out is None:
        return ""
    parts = [part for part in (held_out.name, held_out.split) if part]
    more = f" ({', '.join(parts)})" if isinstance(section.eval, OtherSplit) else ""
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
    held_out = held_out_section(section)
    check_there([path for one in (section, held_out) if one for path, _ in weighted(one.train)])
    problems = _of_files(section, held_out)
    if problems:
        raise ConfigError(problems)
    if held_out:
        _check_apart(section, held_out)


def check_there(sources: Sequence[str]) -> None:
    """Make sure that sources exist.

    Raises:
        DataError: sources are missing or of an unknown kind; the error lists all of them.
    """
    problems = [problem for path in dict.fromkeys(sources) if (problem := check_source(path))]
    if problems:
        raise DataError(problems)


def _of_files(section: DataSection, held_out: DataSection | None) -> list[str]:
    """What a file is asked for that only a data set has: a configuration, or another split."""
    problems = []
    if section.name:
        problems += [
            f"data.name: {path} is a file, which has no configurations; leave the key out" for path in _files(section)
        ]
    if section.split != "train":
        problems += [
            f"data.split: {path} is a file, which has no splits; leave the key out" for path in _files(section)
        ]
    if held_out and isinstance(section.eval, OtherSplit) and (section.eval.split or section.eval.name):
        problems += [
            f"data.eval: {path} is a file, which has neither splits nor configurations; write `eval: 0.1` to hold a "
            "tenth of the rows out, or name another file"
            for path in _files(held_out)
        ]
    return problems


def _files(section: DataSection) -> list[str]:
    return [path for path, _ in weighted(section.train) if Path(path).expanduser().is_file()]


def _check_apart(section: DataSection, held_out: DataSection) -> None:
    trained = {identity(path, section) for path, _ in weighted(section.train)}
    twice = [path for path, _ in weighted(held_out.train) if identity(path, held_out) in trained]
    if twice:
        raise ConfigError([_apart_sentence(path, section) for path in twice])


def identity(path: str, section: DataSection) -> tuple[str | None, ...]:
    """What tells the rows of a source from those of another. Several spellings of a path are one source."""
    place = Path(path).expanduser()
    if place.is_file():
        return (str(place.resolve()),)
    return (str(place.resolve()) if place.exists() else path.casefold(), section.split, section.name)


def _apart_sentence(path: str, section: DataSection) -> str:
    place = Path(path).expanduser()
    if place.is_file():
        return (
            f"data.eval: {path} is the file that is trained on; write `eval: 0.1` to hold a tenth of it out, or name "
            "another file"
        )
    others = [split for split in _splits(place) if split != section.split]
    known = f"; there are the splits {', '.join(others)}" if others else ""
    example = others[0] if others else "validation"
    return (
        f"data.eval: the split `{section.split}` of {path} is trained on; write `eval: {{split: {example}}}` for "
        f"another split, or `eval: 0.1` to hold a tenth of this one out{known}"
    )


def _splits(folder: Path) -> list[str]:
    """The splits of a folder, as far as its files say so; of a hub id none."""
    if is_folder_of_files(folder):
        return list(files_by_split(folder))
    try:
        return list(json.loads((folder / "dataset_dict.json").read_text(encoding="utf-8"))["splits"])
    except (OSError, ValueError, KeyError, TypeError):
        return []
