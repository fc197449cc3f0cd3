"""How far the numbers of a comparison can be trusted: rows that were trained on counted apart, and few rows told."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from phinetune.data.prepare.chat_sets import ChatSet
from phinetune.evaluation.answering import Question
from phinetune.evaluation.bootstrap import Difference

FEW = 30  # held-out rows; below, a sentence says how little they can tell
QUANTILE = 1.96  # of the normal distribution, for 95%


def few_rows(rows: int, what: str = "held-out chats", remedy: str = "hold out 30 or more") -> list[str]:
    """What so few held-out rows can tell, in a sentence; empty if they are enough.

    A share measured on n rows has a standard error of √(p (1 − p) / n), at most √(1 / 4n).

    Args:
        what: the rows are, in the plural.
        remedy: what to do about it.
    """
    if rows >= FEW:
        return []
    if rows < 2:
        return [f"{what}: only {rows}, so no interval can be given, and nothing is proved; {remedy}"]
    points = min(100, math.ceil(100 * QUANTILE * math.sqrt(0.25 / rows)))
    return [
        f"only {rows} {what}: a share of right answers is known to {points} points up or down at worst, so "
        f"smaller differences tell nothing; {remedy}"
    ]


def few_answers(rows: int, prompts: int) -> list[str]:
    """The same of answers, where fewer prompts were answered than rows are held out; empty if none was asked for."""
    if not prompts or prompts >= rows:
        return []
    return few_rows(prompts, "prompts that were answered", "raise evaluation.max_prompts")


def unseen_places(held_out: ChatSet, questions: Sequence[Question]) -> tuple[list[int], list[int]] | None:
    """The places of the held-out rows that are no copies of training rows, and of the questions of those.

    None: there are no copies, or fewer than two other rows, or rows were cut into pieces so that places mean nothing.
    """
    copied = set(held_out.shared.copied) if held_out.shared else set()
    whole = held_out.keys is not None and len(held_out.keys.rows) == len(held_out)
    rows = [place for place in range(len(held_out)) if place not in copied]
    if not copied or not whole or len(rows) < 2:
        return None
    return rows, [place for place, question in enumerate(questions) if question.row not in copied]


def unseen_sentence(rows: int, differences: Mapping[str, Difference]) -> str:
    """The verdict on the rows that are no copies, in a sentence."""
    told = [f"{key.replace('_', ' ')} {differences[key].text}" for key in ("loss", "exact_match") if key in differences]
    return f"on the {rows:,} held-out chats that are no copies of training rows: {'; '.join(told)}"
