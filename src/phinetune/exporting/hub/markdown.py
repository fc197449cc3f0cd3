"""Puts text into Markdown so that it stays text: names and data can hold HTML, links, fences or line breaks."""

from __future__ import annotations

import re

from phinetune.secret_text import without_secrets
from phinetune.terminal_text import printable, visible

_SPECIAL = re.compile(r"([\\`*_{}\[\]<>()#+!|~&]|(?<=\w)(?=://|@))")
_TICKS = re.compile("`+")


def plain(text: str) -> str:
    """Text that is read as it stands, in a heading, a sentence or a cell of a table."""
    return _SPECIAL.sub(lambda match: f"\\{match[0]}" if match[0] else "&#8203;", _one_line(text))


def code(text: str) -> str:
    """A span of code. Its fence is longer than every run of backticks in the text."""
    line = _one_line(text)
    fence = "`" * (_longest_run(line) + 1)
    room = " " if line.startswith("`") or line.endswith("`") or not line.strip() else ""
    return f"{fence}{room}{line}{room}{fence}"


def fenced(language: str, text: str) -> str:
    """A block of code, which nothing in the text can end."""
    lines = visible(without_secrets(text)).rstrip()
    fence = "`" * max(3, _longest_run(lines) + 1)
    return f"{fence}{language}\n{lines}\n{fence}"


def _one_line(text: str) -> str:
    return printable(without_secrets(" ".join(text.splitlines())))


def _longest_run(text: str) -> int:
    return max(map(len, _TICKS.findall(text)), default=0)
