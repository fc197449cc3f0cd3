"""Chats and tokens that lie on disk, read when they are asked for."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, overload

import numpy as np
from datasets import Dataset

from phinetune.chat.encoder import Encoded
from phinetune.chat.template import Message

TRAINED = ["input_ids", "labels", "length"]


class StoredRows(Sequence[Encoded]):
    """Ids and labels of kept rows; `data` has them as columns, and `length`."""

    def __init__(self, data: Dataset) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    @overload
    def __getitem__(self, place: int) -> Encoded: ...
    @overload
    def __getitem__(self, place: slice) -> list[Encoded]: ...
    def __getitem__(self, place: int | slice) -> Encoded | list[Encoded]:
        if isinstance(place, int):
            row = self.data[place]
            return Encoded(row["input_ids"], row["labels"])
        columns = self.data[place]
        return [Encoded(*row) for row in zip(columns["input_ids"], columns["labels"], strict=True)]

    def __iter__(self) -> Iterator[Encoded]:
        return (Encoded(row["input_ids"], row["labels"]) for row in self.data)


class StoredChats(Sequence[list[Message]]):
    """The messages of rows that are chats; `data` has them as JSON in the column `chat`."""

    def __init__(self, data: Dataset) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    @overload
    def __getitem__(self, place: int) -> list[Message]: ...
    @overload
    def __getitem__(self, place: slice) -> list[list[Message]]: ...
    def __getitem__(self, place: int | slice) -> list[Message] | list[list[Message]]:
        found = self.data[place]["chat"]
        return json.loads(found) if isinstance(place, int) else [json.loads(one) for one in found]

    def __iter__(self) -> Iterator[list[Message]]:
        return (json.loads(row["chat"]) for row in self.data)


class Columns:
    """The small columns of a table: what became of its rows, without their tokens."""

    def __init__(self, table: Dataset) -> None:
        self.table = table

    def numbers(self, name: str) -> np.ndarray[Any, Any]:
        """A column of numbers or truths, shape (rows)."""
        made: np.ndarray[Any, Any] = self.table.data.column(name).to_numpy()
        return made

    def texts(self, name: str, places: Sequence[int]) -> Iterator[tuple[int, str]]:
        """(place, text) of the rows at `places` that have one, in order."""
        column = self.table.data.column(name)
        there = column.is_valid().to_numpy()
        for place in places:
            if there[place]:
                yield place, column[place].as_py()

    def counts(self, name: str, places: Sequence[int]) -> Counter[str]:
        """How often each text of a column stands at `places`."""
        taken = self.table.data.column(name).take(np.asarray(places, dtype=np.int64))
        return Counter({one["values"]: one["counts"] for one in taken.value_counts().to_pylist() if one["values"]})
