"""What the engine takes in: token ids with labels, and how two of them compare."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

IGNORED = -100  # the label of a token without loss, as transformers and torch have it


class Encoded(NamedTuple):
    """One example: token ids and their labels, the id where it is trained on and -100 elsewhere; both same length.

    Attributes:
        lengths: tokens of each conversation, where an example holds several one after the other; empty for one.
        values: numbers that the example carries besides, by column; None without any.
    """

    input_ids: list[int]
    labels: list[int]
    lengths: tuple[int, ...] = ()
    values: Mapping[str, float] | None = None

    @property
    def trainable(self) -> int:
        """Tokens with a label."""
        return len(self.labels) - self.labels.count(IGNORED)

    def to_row(self) -> dict[str, Any]:
        """The example as a row of a data set, as the collator takes it."""
        lengths = {"seq_lengths": list(self.lengths)} if self.lengths else {}
        return {"input_ids": self.input_ids, "labels": self.labels, **lengths, **(self.values or {})}


def common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    """How many leading items two sequences share."""
    shared = 0
    for a, b in zip(left, right, strict=False):
        if a != b:
            break
        shared += 1
    return shared
