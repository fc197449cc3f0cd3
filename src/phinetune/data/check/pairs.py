"""Checks pairs of answers: empty ones, and whether the chosen ones are longer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from phinetune.chats.template import Message
from phinetune.data.prepare.encode_rows import RowOutcome

DIFFERS = 0.2  # of the rejected answers' mean length; beyond it, the chosen ones are told to be longer or shorter
FEWEST = 8  # pairs from which on lengths are compared


def empty_answers(outcome: RowOutcome) -> Iterator[tuple[str, str]]:
    """(kind, detail) of a rejected answer without words. A chosen one is a turn of the row's own chat."""
    if outcome.rejected and not _words(_answer(outcome.rejected, len(outcome.rejected))):
        yield "empty_answer", "the rejected one"


def words_of_answers(outcome: RowOutcome) -> list[tuple[int, int]]:
    """How many words the answers of a pair have; nothing for any other row."""
    if not outcome.other or len(outcome.answer_turns) < 2:
        return []
    chosen, rejected = outcome.answer_turns
    return [(_words(_answer(outcome.chat, chosen)), _words(_answer(outcome.other, rejected)))]


def length_bias(words: Sequence[tuple[int, int]]) -> str | None:
    """By how much chosen answers are longer or shorter, as a sentence; None where they hardly are."""
    if len(words) < FEWEST:
        return None
    chosen, rejected = np.asarray(words, dtype=np.float64).T
    change = float(chosen.mean() / max(1.0, rejected.mean()) - 1)
    if abs(change) < DIFFERS:
        return None
    longer = float((chosen > rejected).mean())
    return (
        f"the chosen answers are {abs(change):.0%} {'longer' if change > 0 else 'shorter'} ({chosen.mean():.0f} words "
        f"against {rejected.mean():.0f}); in {longer:.0%} of the pairs the chosen one is the longer one"
    )


def _answer(chat: Sequence[Message], turns: int) -> list[Message]:
    return [turn for turn in chat[len(chat) - turns :] if turn["role"] == "assistant"]


def _words(turns: Sequence[Message]) -> int:
    return sum(len(turn["content"].split()) + len(turn.get("tool_calls", [])) for turn in turns)
