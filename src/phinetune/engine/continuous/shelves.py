"""Keys and values of conversations in memory, and how many bytes they take.

While its prompt is read, a conversation has memory of its own (`RowCache`). While it is answered, it lies in a shelf
with others of similar length, so that one call attends for all of them:

    shelf of capacity 8     slot 0  p p p p a a . .      p: prompt, a: answer, .: unused
                            slot 1  p p p p p a . .

A conversation that has filled its place moves to a shelf of twice the capacity. One that leaves makes room for the
last of its shelf.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from phinetune.engine.attention_plan import Heads

SMALLEST = 64  # tokens of the smallest shelf's places


@dataclass(frozen=True)
class Layout:
    """The shape of a token's keys and values.

    Attributes:
        layers: decoder layers.
        heads: see `Heads`.
    """

    layers: int
    heads: Heads
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, core: Any) -> Layout:
        """That of a model with a packed form."""
        first = core.model.layers[0].self_attn
        return cls(core.config.num_hidden_layers, first.heads, core.dtype, core.device)

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's keys and values in all layers."""
        return 2 * self.layers * self.heads.kv_heads * self.heads.size * self.dtype.itemsize


def place_size(tokens: int) -> int:
    """The capacity of the smallest shelf whose places hold so many tokens."""
    size = SMALLEST
    while size < tokens:
        size *= 2
    return size


class RowCache:
    """The keys and values of one conversation's first tokens.

    Attributes:
        states: shape (layers, 2, kv_heads, capacity, size).
    """

    def __init__(self, layout: Layout, capacity: int) -> None:
        heads = layout.heads
        shape = (layout.layers, 2, heads.kv_heads, capacity, heads.size)
        self.states = torch.empty(shape, dtype=layout.dtype, device=layout.device)
        self.bytes = capacity * layout.token_bytes

    def copy_from(self, states: Tensor, tokens: int) -> None:
        """Take over the first tokens of another conversation's states, of the same shape up to the capacity."""
        self.states[..., :tokens, :] = states[..., :tokens, :]


class Shelf:
    """Conversations whose places have the same capacity.

    Attributes:
        rows: the conversations, in the order of their slots.
        states: for each layer keys and values, shape (2, slots, kv_heads, capacity, size). What is unused is zero or
            an older conversation's, never NaN: it is multiplied with zero.
    """

    def __init__(self, layout: Layout, capacity: int) -> None:
        self.layout, self.capacity = layout, capacity
        self.rows: list[Any] = []
        self.states = [self._empty(0) for _ in range(layout.layers)]

    def _empty(self, slots: int) -> Tensor:
        heads, layout = self.layout.heads, self.layout
        shape = (2, slots, heads.kv_heads, self.capacity, heads.size)
        return torch.zeros(shape, dtype=layout.dtype, device=layout.device)

    @property
    def slots(self) -> int:
        return self.states[0].shape[1]

    @property
    def bytes(self) -> int:
        return self.slots * self.capacity * self.layout.token_bytes

    def slots_with_another(self) -> int:
        """How many slots there are after one more conversation has come."""
        used = len(self.rows)
        return self.slots if used < self.slots else used + max(1, used // 4)

    def add(self, row: Any, states: Tensor, tokens: int) -> None:
        """Give a conversation a place and copy its tokens' states there, shape (layers, 2, kv_heads, …, size)."""
        self._resize(self.slots_with_another())
        slot = len(self.rows)
        for own, given in zip(self.states, states, strict=True):
            own[:, slot, :, :tokens] = given[:, :, :tokens]
        self.rows.append(row)

    def remove(self, row: Any) -> None:
        """Free a conversation's place; the last one moves there."""
        slot, last = self.rows.index(row), len(self.rows) - 1
        moved = self.rows.pop()
        if slot != last:
            self.rows[slot] = moved
            for own in self.states:
                own[:, slot] = own[:, last]
        if self.slots >= 4 * len(self.rows):
            self._resize(2 * len(self.rows))

    def row_states(self, row: Any) -> Tensor:
        """A conversation's states, shape (layers, 2, kv_heads, capacity, size); copied."""
        slot = self.rows.index(row)
        return torch.stack([own[:, slot] for own in self.states])

    def shrink(self) -> None:
        """Free the slots that nobody uses."""
        self._resize(len(self.rows))

    def _resize(self, slots: int) -> None:
        if slots == self.slots:
            return
        used = len(self.rows)
        for i, old in enumerate(self.states):  # layer by layer, so that little lies there twice
            self.states[i] = self._empty(slots)
            self.states[i][:, :used] = old[:, :used]


class Shelves:
    """The shelves of all capacities."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.by_capacity: dict[int, Shelf] = {}

    @property
    def bytes(self) -> int:
        return sum(shelf.bytes for shelf in self.by_capacity.values())

    def bytes_of_another(self, tokens: int) -> int:
        """How many more bytes the shelves take with one more conversation of so many tokens."""
        capacity = place_size(tokens)
        shelf = self.by_capacity.get(capacity)
        more = shelf.slots_with_another() - shelf.slots if shelf else 1
        return more * capacity * self.layout.token_bytes

    def add(self, row: Any, states: Tensor, tokens: int, room: int) -> Shelf:
        """Give a conversation a place with room for so many tokens, and copy the states of those it has."""
        capacity = place_size(room)
        shelf = self.by_capacity.setdefault(capacity, Shelf(self.layout, capacity))
        shelf.add(row, states, tokens)
        return shelf

    def shrink(self) -> None:
        for shelf in self.by_capacity.values():
            shelf.shrink()

    def remove(self, row: Any, shelf: Shelf) -> None:
        shelf.remove(row)
        if not shelf.rows:
            del self.by_capacity[shelf.capacity]
