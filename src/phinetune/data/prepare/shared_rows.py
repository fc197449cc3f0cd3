"""How many held-out rows a run was trained on, as numbers and in sentences. Readers of a run's files use it, too."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Shared:
    """How many held-out rows a run was trained on.

    Attributes:
        rows: how many held-out rows there are.
        copies: how many of them are training rows, but for white space and case.
        near_copies: how many others are nearly equal to a training row; None if there were too many rows to look.
        same_prompt: how many others ask what a training row asks.
        same_group: how many have what a training row has in the column `data.group`.
        copied: the places of the copies and near copies among the held-out rows.
    """

    rows: int
    copies: int
    near_copies: int | None
    same_prompt: int
    same_group: int = 0
    copied: tuple[int, ...] = field(default=(), compare=False)

    def to_dict(self) -> dict[str, Any]:
        """The numbers, as results.json holds them."""
        numbers = {key: value for key, value in asdict(self).items() if key != "copied"}
        return numbers if self.same_group else {key: n for key, n in numbers.items() if key != "same_group"}


def shared_sentences(counts: Mapping[str, Any]) -> list[str]:
    """What a reader must know about held-out rows that were trained on; empty if there is nothing. That near copies
    were not looked for is one thing to know.

    Args:
        counts: the fields of `Shared`, as results.json holds them.
    """
    total, copies, near, asked = (counts.get(key) or 0 for key in ("rows", "copies", "near_copies", "same_prompt"))
    held, sentences = f"of {total:,} held-out chats", []
    if copies:
        more = f", and {near:,} {_are(near, 'a near copy', 'near copies')}" if near else ""
        found = f"{copies:,} {held} {_are(copies, 'a copy', 'copies')} of training rows{more}"
        sentences.append(f"{found}; the comparison is too kind")
    elif near:
        sentences.append(
            f"{near:,} {held} {_are(near, 'a near copy', 'near copies')} of training rows; the comparison is too kind"
        )
    if asked:
        sentences.append(f"{asked:,} {held} {'asks' if asked == 1 else 'ask'} what a training row asks")
    group = counts.get("same_group") or 0
    if group:
        of_a = "is of a group that is" if group == 1 else "are of groups that are"
        sentences.append(f"{group:,} {held} {of_a} trained on (data.group); the comparison may be too kind")
    if "near_copies" in counts and counts["near_copies"] is None:
        sentences.append(
            "near copies of training rows were not looked for among the held-out chats: there are too many rows"
        )
    return sentences


def all_shared(counts: Mapping[str, Any]) -> bool:
    """Whether every held-out row is a copy, or a near copy, of a training row."""
    return bool(counts.get("rows")) and (counts.get("copies") or 0) + (counts.get("near_copies") or 0) == counts["rows"]


def _are(count: int, one: str, several: str) -> str:
    return f"is {one}" if count == 1 else f"are {several}"
