"""Text of a row as a terminal may show it."""

from __future__ import annotations

import unicodedata


def visible(text: str) -> str:
    """Control characters but line breaks as signs, so that none acts on the terminal."""
    return "".join(letter if letter == "\n" else _sign(letter) for letter in text)


def printable(text: str) -> str:
    """One line without any control characters."""
    return "".join(letter if letter.isprintable() else "�" for letter in text)


def _sign(letter: str) -> str:
    if letter < " " or letter == "\x7f":
        return "␡" if letter == "\x7f" else chr(0x2400 + ord(letter))
    return letter if letter.isprintable() or unicodedata.category(letter) == "Zs" else "�"
