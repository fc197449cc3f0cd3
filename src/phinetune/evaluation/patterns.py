"""What can be told of an answer by its letters: a pattern in it, and whether it goes in circles."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

WORDS = 4  # that make a phrase
LETTERS = 20  # that make one where there are hardly any spaces
OFTEN = 3  # times that a phrase must come


def matches(pattern: str, answer: str, *_: Any) -> float:
    """100 where the regular expression is found somewhere in the answer."""
    return 100.0 * bool(re.search(pattern, answer))


def repeats(answer: str, reference: str = "") -> bool:
    """Whether some four words in a row come three times or more, and the reference has nothing of the kind.

    In text with hardly any spaces (Chinese, say) twenty letters stand for the words.
    """
    return _goes_in_circles(answer) and not _goes_in_circles(reference)


def _goes_in_circles(text: str) -> bool:
    units: list[str] = text.split()
    length = WORDS
    if len(text) > LETTERS * max(1, len(units)):
        units, length = list(text), LETTERS
    phrases = Counter(tuple(units[i : i + length]) for i in range(len(units) - length + 1))
    return bool(phrases) and max(phrases.values()) >= OFTEN
