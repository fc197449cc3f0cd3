"""Makes text safe to show on a terminal and in a log: what could act on it stands as a sign."""

from __future__ import annotations

import unicodedata

JOINERS = "\u200c\u200d"  # part of words in Persian and Hindi, and of emoji; they act on their neighbours only


def visible(text: str, kept: str = "\n") -> str:
    """The text with visible signs in place of control characters, which could act on the terminal.

    Control characters begin the escapes that move the cursor, colour, set a title, link or copy; others turn the
    direction of text. So `\\x1b` becomes `␛`.

    Args:
        kept: control characters that stay: line breaks, unless said otherwise.
    """
    if text.isprintable():
        return text
    return "".join(letter if letter in kept else _sign(letter) for letter in text)


def printable(text: str) -> str:
    """The text as one line, with `�` in place of every control character."""
    return "".join(letter if letter.isprintable() or letter in JOINERS else "�" for letter in text)


def _sign(letter: str) -> str:
    if letter < " " or letter == "\x7f":
        return "␡" if letter == "\x7f" else chr(0x2400 + ord(letter))
    is_shown = letter.isprintable() or letter in JOINERS or unicodedata.category(letter) == "Zs"
    return letter if is_shown else "�"
