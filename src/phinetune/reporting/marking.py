"""Marks, word by word, where one text differs from another."""

from __future__ import annotations

import re
from collections.abc import Iterator
from difflib import SequenceMatcher
from typing import NamedTuple

WORDS = re.compile(r"\w+|\s+|[^\w\s]")
EXACT_UP_TO = 2000  # words; in longer texts difflib skips frequent words, as its search takes quadratic time
ALIKE = 0.5  # the least ratio of difflib, from 0 to 1, for marks: texts less alike would be marked almost everywhere


class MarkedText(NamedTuple):
    """A piece of a text, and whether it differs from the other text."""

    text: str
    differs: bool


class Marked(NamedTuple):
    """A text with marks.

    Attributes:
        pieces: the whole text, in order. If it has little in common with the other text, it is one piece.
        throughout: whether it has little in common with the other text.
    """

    pieces: list[MarkedText]
    throughout: bool


def mark(text: str, other: str) -> Marked:
    """`text`, with the pieces marked that `other` does not have at their place."""
    mine, theirs = WORDS.findall(text), WORDS.findall(other)
    quick = max(len(mine), len(theirs)) > EXACT_UP_TO
    matcher = SequenceMatcher(None, theirs, mine, autojunk=quick)
    if mine and theirs and matcher.ratio() < ALIKE:
        return Marked([MarkedText(text, False)], True)
    pieces = (MarkedText("".join(mine[c:d]), tag != "equal") for tag, _, _, c, d in matcher.get_opcodes())
    return Marked(list(_joined(pieces)), False)


def _joined(pieces: Iterator[MarkedText]) -> Iterator[MarkedText]:
    """Joins neighbouring pieces of the same kind. Takes the mark off pieces that are only white space."""
    held = MarkedText("", False)
    for piece in pieces:
        differs = piece.differs and bool(piece.text.strip())
        if differs == held.differs or not piece.text:
            held = MarkedText(held.text + piece.text, held.differs)
            continue
        if held.text:
            yield held
        held = MarkedText(piece.text, differs)
    if held.text:
        yield held
