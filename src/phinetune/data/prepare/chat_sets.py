"""Sets of encoded chats, which a run trains on and evaluates: in memory, on disk or as a stream."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from datasets import Dataset, IterableDataset

from phinetune.chats.encoder import ChatEncoder, ends_a_turn
from phinetune.chats.template import Message
from phinetune.data.prepare.arrow_rows import StoredRows
from phinetune.data.prepare.copies import SetKeys
from phinetune.data.prepare.report import DataReport
from phinetune.data.prepare.shared_rows import Shared
from phinetune.engine.examples import Encoded


@dataclass
class ChatSet:
    """One set of examples.

    Attributes:
        chats: the messages of the examples that are chats. Rows of text or ids have none.
        encoded: the examples as token ids and labels.
        report: what became of the set's rows.
        places: for each of `chats`, its index in `encoded`.
        tags: for each of `encoded`, what its row has in the column `data.tag`; empty without such a column.
        where: for each of `encoded`, its row's place (`chats.jsonl:17`); empty where places are not kept: of rows on
            disk, and of a stream.
        stored_end: for rows on disk, whether any label is an end-of-turn token.
        stream: all rows, if the set is a stream; then the rest of the set is only the stream's beginning.
        keys: what the kept rows are compared by with those of another set; None if they can't be compared.
        shared: of held-out rows, how many of them are trained on; None if that was not looked at.
        not_compared: of held-out rows, a sentence if they were not compared with all training rows: why.
    """

    chats: Sequence[list[Message]]
    encoded: Sequence[Encoded]
    report: DataReport
    places: Sequence[int] = field(default_factory=list)
    tags: Sequence[str] = field(default_factory=list)
    where: Sequence[str] = field(default_factory=list)
    stored_end: bool = False
    stream: IterableDataset | None = None
    keys: SetKeys | None = None
    shared: Shared | None = None
    not_compared: str | None = None

    def __len__(self) -> int:
        return len(self.encoded)

    def at(self, rows: Sequence[int]) -> ChatSet:
        """The set with some of its examples alone; its report stays that of all. `rows`: their indexes, in order."""
        now = {row: i for i, row in enumerate(rows)}
        chats = [i for i, place in enumerate(self.places) if place in now]
        whole = self.keys is not None and len(self.keys.rows) == len(self)  # else places of keys are no examples'
        copied = tuple(now[row] for row in (self.shared.copied if self.shared else ()) if row in now)
        return replace(
            self,
            chats=[self.chats[i] for i in chats],
            encoded=self.encoded.at(rows) if isinstance(self.encoded, StoredRows) else [self.encoded[i] for i in rows],
            places=[now[self.places[i]] for i in chats],
            tags=[self.tags[row] for row in rows] if self.tags else [],
            where=[self.where[row] for row in rows] if self.where else [],
            keys=self.keys.at(rows) if self.keys and whole else None,
            shared=replace(self.shared, copied=copied) if self.shared else None,
        )

    def ends_a_turn(self, encoder: ChatEncoder) -> bool:
        """Whether any label is an end-of-turn token."""
        return self.stored_end if isinstance(self.encoded, StoredRows) else ends_a_turn(encoder, self.encoded)

    def lengths(self) -> np.ndarray[Any, Any]:
        """The number of tokens of each example, shape (examples)."""
        if isinstance(self.encoded, StoredRows):
            return np.asarray(self.encoded.data.with_format("numpy")["length"][:])
        return np.asarray([len(row.input_ids) for row in self.encoded])

    def dataset(self) -> Dataset | IterableDataset:
        """The examples as the trainer takes them: `input_ids`, `labels` and what the objective adds. Examples on disk
        have their `length` too.
        """
        if self.stream is not None:
            return self.stream
        if isinstance(self.encoded, StoredRows):
            return self.encoded.data
        rows = [row.to_row() for row in self.encoded]
        return Dataset.from_dict({column: [row[column] for row in rows] for column in rows[0]})


@dataclass
class Chats:
    """A run's training chats, its held-out chats, and those of its final verdict; None where there are none.

    Attributes:
        replay: what of the base's own answers was mixed into `train`, beside its report; None without any.
    """

    train: ChatSet
    held_out: ChatSet | None
    test: ChatSet | None = None
    replay: dict[str, int] | None = None

    @property
    def measured(self) -> ChatSet | None:
        """The chats on which base and tuned model are compared at the end."""
        return self.test or self.held_out

    def facts(self) -> dict[str, Any]:
        """The reports of the sets, and how many of the measured rows are trained on, as JSON can hold them.

        `held_out` is None without held-out chats, `test` is left out without such chats, and `overlap` is None where
        the measured set could not be compared. Where not all training rows were looked at, `not_compared` says why.
        """
        sets = {"train": self.train, "held_out": self.held_out, **({"test": self.test} if self.test else {})}
        shared, unlooked = (self.measured.shared, self.measured.not_compared) if self.measured else (None, None)
        return {
            **{name: chat_set.report.to_dict() if chat_set else None for name, chat_set in sets.items()},
            "overlap": shared.to_dict() if shared else None,
            **({"replay": self.replay} if self.replay else {}),
            **({"not_compared": unlooked} if unlooked else {}),
        }
