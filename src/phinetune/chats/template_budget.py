"""Counts the work of a chat template, and stops a template that does more than any chat needs.

Every block that is entered and every value that is made costs units. What would be made is counted before it is made.
So a template from a stranger can neither take the memory nor run on for ever.
"""

from __future__ import annotations

import re
import time
from collections.abc import Collection, Iterator, Mapping
from functools import lru_cache
from typing import Any

from jinja2.exceptions import SecurityError

STEP = 8  # units of a block that is entered, of a call, and of a number; a letter costs 1
BASE = 8_000_000  # units of any chat: a million steps, or 8 MB of letters
PER_LETTER = 100  # further units for each letter of the chat
PER_TURN = 8  # further units for each letter and turn: a template may build its text up, turn by turn
SECONDS = 10.0  # of the processor; a usual chat takes some 20 microseconds
LOOK = 100_000  # units between two looks at the clock
UNKNOWN = 1_000  # units of a sequence whose length is not known yet
LONGEST_RUN = 7  # digits in a format; a longer number is more than any budget

EXCESS = "it does far more than this chat needs (endless loops, or text of many megabytes)"

LONGEST_KNOWN = 500  # letters of a format whose amount is kept; a template applies the same one to every turn
NESTED = re.compile(r"\{[^{}]*\{")
_DIGITS = re.compile(r"\d+")


class Budget:
    """The units that are left to a template while it renders a chat. The clock is looked at now and then.

    Attributes:
        left: how many units are left until the next look at the clock.
        letters: how many letters the template may write.
    """

    def __init__(self) -> None:
        self.refill(0, 0)

    def refill(self, letters: int, turns: int) -> None:
        """Begin a chat of so many letters and turns."""
        self.letters = BASE + letters * (PER_LETTER + PER_TURN * turns)
        self.left = min(LOOK, self.letters)
        self._rest = self.letters - self.left
        self._end = 0.0

    @property
    def units(self) -> int:
        """How many units are left in all."""
        return self._rest + self.left

    def spend(self, units: int) -> None:
        """Take units off.

        Raises:
            SecurityError: none is left, or the time is over.
        """
        self.left -= units
        if self.left < 0:
            self.look()

    def look(self) -> None:
        """Look at the clock, and make the next units available."""
        if self.units < 0:
            raise SecurityError(EXCESS)
        now = time.thread_time()
        self._end = self._end or now + SECONDS
        if now > self._end:
            raise SecurityError(f"it takes longer than {SECONDS:.0f} seconds for one chat")
        units = self.units
        self.left = min(LOOK, units)
        self._rest = units - self.left


def weigh(value: Any, most: float = float("inf")) -> int:
    """How many letters a value has when it is written. A part that it has several times counts as often.

    Args:
        most: where to stop counting: a value that holds itself has no end.
    """
    if type(value) is str:
        return len(value)
    found = 0
    waiting = [value]
    while waiting and found <= most:
        one = waiting.pop()
        if isinstance(one, Mapping):
            waiting += [part for pair in one.items() for part in pair]
        elif isinstance(one, Collection) and not isinstance(one, (str, bytes, range)):
            waiting += one
        found += STEP + size(one)
    return found


def size(value: Any) -> int:
    """How much a value has at its uppermost level: letters, parts, or digits."""
    kind = type(value)
    if kind is str or kind is list or kind is dict:
        return len(value)
    if isinstance(value, int):
        return STEP + value.bit_length() // 3
    if isinstance(value, Iterator):
        return UNKNOWN
    return len(value) if isinstance(value, Collection) else STEP


def amount(value: Any, most: float = float("inf")) -> int:
    """How much an argument can make another value grow: numbers as they are, anything else as it is written."""
    if isinstance(value, (int, float)):
        return int(min(abs(value), most + 1)) if value == value else 0
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
    numbers = (amount(part, most) for part in parts if isinstance(part, (int, float)))
    return max(weigh(value, most), max(numbers, default=0))


def format_amount(text: str) -> int:
    """`amount` for a format: it can make values as long as the numbers in it say.

    Raises:
        SecurityError: a format holds another, so that a value says how long the text is.
    """
    return _known_format_amount(text) if len(text) < LONGEST_KNOWN else _format_amount(text)


def _format_amount(text: str) -> int:
    if NESTED.search(text.replace("{{", "")):
        raise SecurityError("it formats text in a width that is computed")
    runs = _DIGITS.findall(text)
    return len(text) + sum(int(run) if len(run) <= LONGEST_RUN else 10**LONGEST_RUN * len(run) for run in runs)


_known_format_amount = lru_cache(maxsize=256)(_format_amount)
