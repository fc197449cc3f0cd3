"""Keeps keys and values of conversations that have ended, for those that begin alike: the next turn, the same system
prompt. What was not used for the longest time goes first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from phinetune.engine.continuous.shelves import RowCache

# What must be the same for two conversations to share states: the adapter, and whether longrope's long factors rotate.
Kind = tuple[str | None, bool]


def as_ids(tokens: Sequence[int]) -> NDArray[np.int32]:
    return np.asarray(tokens, dtype=np.int32)


def shared_length(left: NDArray[np.int32], right: NDArray[np.int32]) -> int:
    """How many leading tokens two conversations share."""
    both = min(len(left), len(right))
    differ = left[:both] != right[:both]
    first = int(differ.argmax()) if both else 0
    return first if both and differ[first] else both


@dataclass
class _Entry:
    kind: Kind
    tokens: NDArray[np.int32]
    cache: RowCache


class PrefixStore:
    """States by the tokens that they stand for. The one used last is at the end."""

    def __init__(self) -> None:
        self._entries: list[_Entry] = []

    @property
    def bytes(self) -> int:
        return sum(entry.cache.bytes for entry in self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def put(self, kind: Kind, tokens: NDArray[np.int32], cache: RowCache) -> None:
        """Keep states. Those that are the beginning of these are dropped."""
        kept = []
        for entry in self._entries:
            shared = shared_length(entry.tokens, tokens) if entry.kind == kind else 0
            if shared < len(entry.tokens):
                kept.append(entry)
        self._entries = [*kept, _Entry(kind, tokens, cache)]

    def find(self, kind: Kind, tokens: NDArray[np.int32]) -> tuple[int, RowCache | None]:
        """The states that share the most first tokens, and how many."""
        lengths = [shared_length(e.tokens, tokens) if e.kind == kind else 0 for e in self._entries]
        best = max(range(len(lengths)), key=lengths.__getitem__, default=None)
        if best is None or not lengths[best]:
            return 0, None
        entry = self._entries.pop(best)
        self._entries.append(entry)
        return lengths[best], entry.cache

    def drop_oldest(self) -> bool:
        """Free the states that were not used for the longest time. Returns whether there were any."""
        return bool(self._entries) and self._entries.pop(0) is not None

    def drop_adapter(self, adapter: str) -> None:
        self._entries = [entry for entry in self._entries if entry.kind[0] != adapter]
