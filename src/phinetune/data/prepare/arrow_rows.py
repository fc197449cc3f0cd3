"""Chats and examples on disk, which are read only when they are needed."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, overload

import numpy as np
from datasets import Dataset

from phinetune.chats.template import Message
from phinetune.data.prepare.copies import Marks, SetKeys
from phinetune.data.prepare.duplicates import Hashes
from phinetune.data.prepare.encode_rows import RowEncoder
from phinetune.engine.examples import Encoded


def trained_columns(encode: RowEncoder) -> list[str]:
    """The columns of a table that training reads."""
    return ["input_ids", "labels", "length", *(["seq_lengths"] if encode.joins else []), *encode.columns]


class StoredRows(Sequence[Encoded]):
    """The examples of kept rows.

    Args:
        data: the columns of `trained_columns`.
        columns: the names of the numbers that an example has besides its tokens.
    """

    def __init__(self, data: Dataset, columns: Sequence[str] = ()) -> None:
        self.data, self.columns = data, tuple(columns)

    def at(self, places: Sequence[int]) -> StoredRows:
        """The examples at some places."""
        return StoredRows(self.data.select(places), self.columns)

    def _example(self, row: Mapping[str, Any]) -> Encoded:
        values = {column: row[column] for column in self.columns} or None
        return Encoded(row["input_ids"], row["labels"], tuple(row.get("seq_lengths") or ()), values)

    def __len__(self) -> int:
        return len(self.data)

    @overload
    def __getitem__(self, place: int) -> Encoded: ...
    @overload
    def __getitem__(self, place: slice) -> list[Encoded]: ...
    def __getitem__(self, place: int | slice) -> Encoded | list[Encoded]:
        if isinstance(place, int):
            return self._example(self.data[place])
        columns = self.data[place]
        rows = zip(*columns.values(), strict=True)
        return [self._example(dict(zip(columns, row, strict=True))) for row in rows]

    def __iter__(self) -> Iterator[Encoded]:
        return (self._example(row) for row in self.data)


class StoredChats(Sequence[list[Message]]):
    """The messages of the rows that are chats. `data` holds them as JSON in the column `chat`."""

    def __init__(self, data: Dataset) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    @overload
    def __getitem__(self, place: int) -> list[Message]: ...
    @overload
    def __getitem__(self, place: slice) -> list[list[Message]]: ...
    def __getitem__(self, place: int | slice) -> list[Message] | list[list[Message]]:
        text = self.data[place]["chat"]  # a list of texts for a slice
        return json.loads(text) if isinstance(place, int) else [json.loads(one) for one in text]

    def __iter__(self) -> Iterator[list[Message]]:
        return (json.loads(row["chat"]) for row in self.data)


class StoredShingles:
    """What near copies of rows are found by, read batch by batch. `data` holds it in the column `shingles`."""

    def __init__(self, data: Dataset) -> None:
        self.data = data.with_format("numpy")

    def __iter__(self) -> Iterator[Hashes]:
        for batch in self.data.iter(1000):
            yield from (np.asarray(one, dtype=np.uint32) for one in batch["shingles"])


class Columns:
    """The small columns of a table. They say what became of its rows; the tokens are not read."""

    def __init__(self, table: Dataset) -> None:
        self.table = table

    def numbers(self, name: str) -> np.ndarray[Any, Any]:
        """A column of numbers or booleans, shape (rows)."""
        values: np.ndarray[Any, Any] = self.table.data.column(name).to_numpy()
        return values

    def texts(self, name: str, places: Sequence[int]) -> Iterator[tuple[int, str]]:
        """The place and the text of each row at `places` that has a text in this column, in order."""
        column = self.table.data.column(name)
        has_text = column.is_valid().to_numpy()
        for place in places:
            if has_text[place]:
                yield place, column[place].as_py()

    def lines_of(self, rows: Sequence[int]) -> list[int]:
        """The lines of the table that hold some rows, in order. A row has several if it was cut into pieces."""
        first, order = self.first_lines(), np.asarray(rows, dtype=np.int64)
        pieces = np.diff(first, append=len(self.table))[order]
        before = np.cumsum(pieces) - pieces
        lines: list[int] = (np.repeat(first[order] - before, pieces) + np.arange(pieces.sum())).tolist()
        return lines

    def first_lines(self) -> np.ndarray[Any, Any]:
        """The line of each row's first piece, shape (rows of the source)."""
        return np.flatnonzero(self.numbers("piece") == 0)

    def keys(self, lines: np.ndarray[Any, Any], near: Marks | None = None) -> SetKeys:
        """What the rows whose first pieces stand on some lines are compared by.

        Args:
            near: of all rows, which are nearly equal, if that is known.
        """
        rows, asked = (self.table.data.column(name).take(lines).to_pylist() for name in ("key", "asked"))
        named = self.table.data.column("group").take(lines).to_pylist()
        shingles = StoredShingles(self.table.select_columns("shingles").select(lines))
        if near is not None:
            near = [near[row] for row in np.searchsorted(self.first_lines(), lines)]
        return SetKeys(rows, asked, near, named if any(named) else None, stored=shingles)

    def counts(self, name: str, places: Sequence[int]) -> Counter[str]:
        """How many of the rows at `places` have each text of this column."""
        taken = self.table.data.column(name).take(np.asarray(places, dtype=np.int64))
        return Counter({one["values"]: one["counts"] for one in taken.value_counts().to_pylist() if one["values"]})
