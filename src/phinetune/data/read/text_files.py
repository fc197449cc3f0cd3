"""Rows of plain text and Markdown: `{"text": …}`, a paragraph each, or parts that are cut by tokens later."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from phinetune.data.read.encodings import decode_line, lines_of
from phinetune.data.read.packed import kind_of
from phinetune.data.read.row import Broken, Row

# Characters of a part, which becomes pieces of `max_length` tokens. So a book is held in memory part by part, and a
# share of it can be held out; one piece in a part is shorter than the others.
PART = 100_000
FENCE = re.compile(r"\s*(```|~~~)")
HEADING = re.compile(r"#{1,6}\s")


def read_text_file(path: Path, text_by: str) -> Iterator[Row | Broken]:
    """The paragraphs of a file, or its parts of up to `PART` characters if `text_by` is `tokens`.

    An empty line ends a paragraph, but not inside a fenced block of Markdown. A heading of Markdown stays with the
    paragraph that follows.
    """
    paragraphs = _paragraphs(_lines(path), markdown=kind_of(path) == ".md")
    try:
        for number, text in _parts(paragraphs) if text_by == "tokens" else paragraphs:
            yield Row(f"{path}:{number}", {"text": text})
    except _NotUtf8 as error:
        yield Broken(error.where, error.problem, "encoding")


class _NotUtf8(Exception):
    """A line that is not UTF-8: its place, and what is wrong with it."""

    def __init__(self, where: str, problem: str) -> None:
        self.where, self.problem = where, problem


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    for number, raw in lines_of(path):
        line, problem = decode_line(raw)
        if problem or line is None:
            raise _NotUtf8(f"{path}:{number}", problem or "")
        yield number, line.rstrip("\r\n")


def _paragraphs(lines: Iterable[tuple[int, str]], markdown: bool) -> Iterator[tuple[int, str]]:
    """The number of the first line of each paragraph, and its text."""
    waiting: list[str] = []
    start, fenced = 0, False
    for number, line in lines:
        if markdown and FENCE.match(line):
            fenced = not fenced
        if line.strip() or fenced:
            start = start if waiting else number
            waiting.append(line)
        elif waiting and markdown and all(not one.strip() or HEADING.match(one) for one in waiting):
            waiting.append(line)
        elif waiting:
            yield start, "\n".join(waiting)
            waiting = []
    if any(one.strip() for one in waiting):
        yield start, "\n".join(waiting).rstrip()


def _parts(paragraphs: Iterable[tuple[int, str]]) -> Iterator[tuple[int, str]]:
    """Paragraphs joined up to `PART` characters."""
    waiting: list[str] = []
    start = size = 0
    for number, text in paragraphs:
        if waiting and size + len(text) > PART:
            yield start, "\n\n".join(waiting)
            waiting, size = [], 0
        start = start if waiting else number
        waiting.append(text)
        size += len(text) + 2
    if waiting:
        yield start, "\n\n".join(waiting)
