"""Measures of an answer's text alone: whether it contains a pattern, and whether it repeats itself."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

WORDS = 4  # of a phrase
LETTERS = 20  # of a phrase, in text with hardly any spaces
OFTEN = 3  # times that a phrase occurs in a text that repeats itself


def matches(pattern: str, answer: str, *_: Any) -> float:
    """100 if the regular expression matches somewhere in the answer, else 0."""
    return 100.0 * bool(re.search(pattern, answer))


def repeats(answer: str, reference: str = "") -> bool:
    """Whether the answer contains the same four words in a row three times or more, and the reference does not.

    In text with hardly any spaces, for example Chinese, twenty letters take the place of the four words.
    """
    return _repeats_itself(answer) and not _repeats_itself(reference)


def _repeats_itself(text: str) -> bool:
    """Whether a phrase occurs `OFTEN` times or more."""
    units: list[str] = text.split()
    length = WORDS
    if len(text) > LETTERS * max(1, len(units)):
        units, length = list(text), LETTERS
    phrases = Counter(tuple(units[i : i + length]) for i in range(len(units) - length + 1))
    return bool(phrases) and max(phrases.values()) >= OFTEN
