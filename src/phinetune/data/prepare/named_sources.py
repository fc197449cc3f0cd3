"""The sources that a key of the configuration names, one by one, each with its weight."""

from __future__ import annotations

from collections.abc import Sequence

from phinetune.config.data import WeightedFile
from phinetune.data.read.any_source import files_of_pattern

Named = str | Sequence[str | WeightedFile] | None


def weighted(source: Named) -> list[tuple[str, float]]:
    """Each source and its weight, which is 1 if none is given. A pattern stands for the files whose names it fits."""
    return [(file, weight) for path, weight in _named(source) for file in files_of_pattern(path)]


def _named(source: Named) -> list[tuple[str, float]]:
    """What a configuration names, patterns of names as they stand there, and the weight of each."""
    entries = [source] if isinstance(source, str) else list(source or [])
    return [(entry, 1.0) if isinstance(entry, str) else (entry.path, entry.weight) for entry in entries]


def name_sources(source: Named) -> str:
    """The sources in one line, for example `a.jsonl, b.jsonl × 2`."""
    return ", ".join(path if weight == 1 else f"{path} × {weight:g}" for path, weight in _named(source))
