"""Two texts side by side, what differs marked, by whole words."""

from __future__ import annotations

import re
from collections.abc import Iterator
from difflib import SequenceMatcher
from typing import NamedTuple

WORDS = re.compile(r"\w+|\s+|[^\w\s]")
EXACT_UP_TO = 2000  # words; beyond, difflib leaves frequent words out of its search, which is quadratic

ALIKE = 0.5  # difflib's ratio, white space counted, below which marks on words would be confetti


class MarkedText(NamedTuple):
    """A stretch of a text, and whether the other text lacks it."""

    text: str
    differs: bool


class Marked(NamedTuple):
    """A text in pieces, in order and whole; one that has little in common with the other is a single piece."""

    pieces: list[MarkedText]
    throughout: bool


def mark(text: str, other: str) -> Marked:
    """The pieces of `text`: those that `other` has at their place, and those it lacks."""
    mine, theirs = WORDS.findall(text), WORDS.findall(other)
    quick = max(len(mine), len(theirs)) > EXACT_UP_TO
    matcher = SequenceMatcher(None, theirs, mine, autojunk=quick)
    if mine and theirs and matcher.ratio() < ALIKE:
        return Marked([MarkedText(text, False)], True)
    pieces = (MarkedText("".join(mine[c:d]), tag != "equal") for tag, _, _, c, d in matcher.get_opcodes())
    return Marked(list(_joined(pieces)), False)


def _joined(pieces: Iterator[MarkedText]) -> Iterator[MarkedText]:
    """Neighbours of a kind as one, and no mark on white space alone."""
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
