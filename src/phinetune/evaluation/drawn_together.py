"""Which held-out rows say the same: intervals draw them together, or they would be narrower than is known.

Ten chats of one customer tell less about other customers than ten chats of ten. So a bootstrap draws groups, not rows
(Davison and Hinkley 1997, section 3.8).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from phinetune.data.prepare.chat_sets import ChatSet
from phinetune.data.prepare.copies import joined
from phinetune.evaluation.answering import Question
from phinetune.evaluation.bootstrap import Units
from phinetune.evaluation.trust import few_rows


@dataclass(frozen=True)
class DrawnTogether:
    """What the rows and the prompts of a comparison are drawn with: those of one group, and copies of each other.

    Attributes:
        rows: shape (rows). `prompts`: shape (prompts).
    """

    rows: Units
    prompts: Units

    @classmethod
    def of(cls, held_out: ChatSet, questions: Sequence[Question]) -> DrawnTogether | None:
        """None: each row stands for itself, or it is not known what rows have in common: of streams, and of rows that
        were cut into pieces.
        """
        rows = units_of(held_out)
        return None if rows is None else cls(rows, rows[[question.row for question in questions]])

    def at(self, rows: Sequence[int], prompts: Sequence[int]) -> DrawnTogether:
        """The same for some rows and prompts."""
        return DrawnTogether(self.rows[list(rows)], self.prompts[list(prompts)])


def units_of(held_out: ChatSet) -> Units | None:
    """What each row is drawn with; None as in `DrawnTogether.of`."""
    keys = held_out.keys
    if keys is None or len(keys.rows) != len(held_out):
        return None
    units = joined(len(held_out), [keys.rows, *([keys.group] if keys.group else [])])
    return np.asarray(units, dtype=np.int64) if len(set(units)) < len(units) else None


def group_sentences(held_out: ChatSet) -> list[str]:
    """What intervals are over, where `data.group` names groups; and how little few of them can tell."""
    keys, units = held_out.keys, units_of(held_out)
    if keys is None or not keys.group:
        return []
    if len(keys.rows) != len(held_out):
        return ["rows were cut into pieces, so intervals draw each piece by itself, not the groups of data.group"]
    count = len(held_out) if units is None else len(set(units.tolist()))
    few = few_rows(count, "groups of held-out chats (data.group)", "hold out chats of 30 groups or more")
    told = f"intervals draw the {count:,} groups of data.group, not the {len(held_out):,} held-out chats one by one"
    return [told, *few] if count < len(held_out) else few
