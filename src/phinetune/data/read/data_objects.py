"""Rows of what a Python program holds: a `Dataset`, a data frame, a list or an iterator of dicts.

A library that is not loaded can't have made the object, so nothing is imported to find out what it is.
"""

from __future__ import annotations

import hashlib
import json
import sys
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from phinetune.data.read.plain_values import jsonable, plain
from phinetune.data.read.row import Row
from phinetune.errors import DataError, reason_of

CHUNK = 1024  # rows of a frame that are made at a time
LOOKED_AT = 512  # rows of a stream that its fingerprint is made of
KINDS = (
    "a file, a datasets.Dataset, DatasetDict or IterableDataset, a pandas or polars frame, a list or an iterator of "
    "dicts"
)

# What iterators gave, for as long as they live: each can be read once only.
_read: weakref.WeakKeyDictionary[Any, list[Any]] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class HeldRows:
    """Rows that a Python program holds.

    Attributes:
        title: what they are, with their number: "list of 40 rows".
        noun: how the place of a row calls them: "the list".
        splits: the rows by split; the single key is empty where there are no splits.
        digest: SHA-256 of all rows as JSON, in order.
    """

    title: str
    noun: str
    splits: Mapping[str, Any]
    digest: str = field(repr=False)

    @property
    def has_splits(self) -> bool:
        return "" not in self.splits

    def split(self, name: str) -> Any:
        """What a split holds.

        Raises:
            DataError: there is no such split.
        """
        if not self.has_splits:
            return self.splits[""]
        if name not in self.splits:
            raise DataError(f"{self.noun}: there is no split `{name}`; there are {', '.join(self.splits)} (data.split)")
        return self.splits[name]

    def rows(self, split: str) -> Iterator[Row]:
        """The rows of a split with their places; numbers begin at 1."""
        noun = f"the split {split} of {self.noun}" if self.has_splits else self.noun
        return _numbered(self.split(split), noun)


def hold(given: Any, where: str, *, streaming: bool = False) -> HeldRows:
    """The rows of a data object.

    Args:
        where: what error messages and the places of rows call it: `data.train`, `data.eval`, …
        streaming: an `IterableDataset` is not read to its end.

    Raises:
        DataError: it is no data object, a row is no dict, or there is no row.
    """
    kind = kind_of(given)
    if kind is None:
        raise DataError(f"{where}: {type(given).__name__} is no kind of data; give {KINDS}")
    noun = f"the {kind}" if where == "data.train" else f"the {kind} of {where}"
    parts = dict(given) if kind in ("DatasetDict", "IterableDatasetDict") else {"": given}
    splits = {name: _kept(part, noun, streaming) for name, part in parts.items()}
    total, counts = hashlib.sha256(), {}
    for name, part in splits.items():
        total.update(name.encode())
        rows = _numbered(part, noun)
        counts[name] = sum(1 for row in _hashed(islice(rows, LOOKED_AT) if _is_stream(part) else rows, total))
    if not any(counts.values()):
        once = "; an iterator can be read once, so make a new one" if isinstance(given, Iterator) else ""
        raise DataError(f"{where}: {noun} holds no row{once}")
    return HeldRows(_title(kind, splits, counts), noun, splits, total.hexdigest())


def _title(kind: str, splits: Mapping[str, Any], counts: Mapping[str, int]) -> str:
    told = {
        name: f"its first {counts[name]:,} rows" if _is_stream(part) else f"{counts[name]:,} rows"
        for name, part in splits.items()
    }
    listed = ", ".join(f"{name} {text}" for name, text in told.items()) if "" not in told else told[""]
    return f"{kind} of {listed}"


def _hashed(rows: Iterable[Row], total: Any) -> Iterator[Row]:
    for row in rows:
        total.update(json.dumps(row.fields, default=jsonable).encode())
        yield row


def kind_of(given: Any) -> str | None:
    """What a data object is, in words; None for what is none: a text, a path, a dictionary, a list of files."""
    for library, names, words in (
        ("datasets", ("Dataset", "DatasetDict", "IterableDataset", "IterableDatasetDict"), "{}"),
        ("pandas", ("DataFrame",), "pandas frame"),
        ("polars", ("DataFrame", "LazyFrame"), "polars frame"),
        ("pyarrow", ("Table",), "pyarrow table"),
    ):
        module = sys.modules.get(library)
        for name in names if module else ():
            kind = getattr(module, name, None)
            if isinstance(kind, type) and isinstance(given, kind):
                return words.format(name)
    if isinstance(given, (list, tuple)):
        return "list" if _is_rows(given) else None
    if isinstance(given, (str, bytes, Mapping)) or hasattr(given, "__fspath__"):
        return None
    if isinstance(given, Iterator):
        return "generator" if hasattr(given, "gi_frame") else "iterator"
    indexed = hasattr(given, "__len__") and hasattr(given, "__getitem__")  # as torch's data sets have it
    return type(given).__name__ if hasattr(given, "__iter__") or indexed else None


def _is_rows(listed: Sequence[Any]) -> bool:
    """Whether a list holds rows, and no files with their weights."""
    for entry in listed:
        if isinstance(entry, (list, tuple)) or (isinstance(entry, Mapping) and kind_of(entry) is None):
            return isinstance(entry, (list, tuple)) or not ("path" in entry and set(entry) <= {"path", "weight"})
    return False


def _kept(part: Any, noun: str, streaming: bool) -> Any:
    """What can be read again and again."""
    if isinstance(part, Iterator):
        return _read_once(part, noun)
    if _is_stream(part) and not streaming:
        return list(part)
    if _of("polars", "LazyFrame", part):
        return part.collect()
    return part.with_format(None) if _of("datasets", "Dataset", part) else part


def _read_once(given: Iterator[Any], noun: str) -> list[Any]:
    """All that an iterator gives. One that can be referred to weakly, as a generator, may be given again."""
    if not hasattr(given, "__weakref__") and not hasattr(given, "gi_frame"):
        return _drained(given, noun)
    if given not in _read:
        _read[given] = _drained(given, noun)
    return _read[given]


def _drained(given: Iterator[Any], noun: str) -> list[Any]:
    rows: list[Any] = []
    try:
        for row in given:
            rows.append(row)
    except Exception as error:
        raise DataError(f"row {len(rows) + 1} of {noun}: {noun} failed: {reason_of(error)}") from error
    return rows


def _numbered(part: Any, noun: str) -> Iterator[Row]:
    for number, fields in enumerate(_rows_of(part), 1):
        where = f"row {number} of {noun}"
        if not isinstance(fields, Mapping):
            hint = '; a chat is a dict such as {"messages": […]}' if isinstance(fields, (list, tuple)) else ""
            raise DataError(f"{where}: expected a dict, found {type(fields).__name__}{hint}")
        yield Row(where, plain(fields))


def _rows_of(part: Any) -> Iterator[Any]:
    if _of("pandas", "DataFrame", part):
        return _of_pandas(part)
    if _of("polars", "DataFrame", part):
        return iter(part.iter_rows(named=True))
    if _of("pyarrow", "Table", part):
        return (row for batch in part.to_batches(CHUNK) for row in batch.to_pylist(maps_as_pydicts="lossy"))
    return iter(part) if hasattr(part, "__iter__") else (part[i] for i in range(len(part)))


def _of_pandas(frame: Any) -> Iterator[dict[str, Any]]:
    """The rows of a frame. Its missing values are None; whole numbers that it turned to floats for these stay whole."""
    if not frame.columns.is_unique:
        twice = frame.columns[frame.columns.duplicated()][0]
        raise DataError(f"the pandas frame has two columns `{twice}`, and only one could be read; rename one")
    whole = [str(name) for name in frame.columns if frame[name].dtype.kind == "f" and _was_whole(frame[name])]
    for start in range(0, len(frame), CHUNK):
        for row in frame.iloc[start : start + CHUNK].to_dict("records"):
            fields = {str(name): None if isinstance(v, float) and v != v else v for name, v in row.items()}
            made_whole = {name: int(value) for name in whole if (value := fields[name]) is not None}
            yield {**fields, **made_whole}


def _was_whole(column: Any) -> bool:
    present = column.dropna()
    return len(present) < len(column) and bool((present % 1 == 0).all())


def _is_stream(part: Any) -> bool:
    return _of("datasets", "IterableDataset", part)


def _of(library: str, name: str, given: Any) -> bool:
    module = sys.modules.get(library)
    return module is not None and isinstance(given, getattr(module, name))
