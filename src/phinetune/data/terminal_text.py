"""Makes text of a row safe to show on a terminal."""

from __future__ import annotations

import unicodedata


def visible(text: str) -> str:
    """The text with visible signs in place of control characters, which could act on the terminal. Line breaks stay."""
    return "".join(letter if letter == "\n" else _sign(letter) for letter in text)


def printable(text: str) -> str:
    """The text as one line, with `�` in place of every control character."""
    return "".join(letter if letter.isprintable() else "�" for letter in text)


def _sign(letter: str) -> str:
    if letter < " " or letter == "\x7f":
        return "␡" if letter == "\x7f" else chr(0x2400 + ord(letter))
    return letter if letter.isprintable() or unicodedata.category(letter) == "Zs" else "�"
