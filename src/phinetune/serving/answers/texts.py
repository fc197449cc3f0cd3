"""Makes text of tokens as they come, and holds back what may turn out to be the end, or a tool call."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

BYTE = re.compile(r"<0x([0-9A-F]{2})>")  # a byte that has a token of its own, in vocabularies of SentencePiece
BROKEN = "\ufffd"  # stands for bytes that are no whole sign yet


class Decoder:
    """The text of tokens that come one after the other: together exactly what the tokenizer makes of all of them."""

    def __init__(self, tokenizer: Any, shown: frozenset[int] = frozenset()) -> None:
        """Make one.

        Args:
            shown: special tokens that the text holds; all others are left out.
        """
        self._tokenizer = tokenizer
        self._hidden = (set(tokenizer.all_special_ids) | _special(tokenizer)) - shown
        self._ids: list[int] = []
        self._from = self._told = 0  # tokens before `_from` are not looked at; those before `_told` have been told

    def add(self, token: int) -> str:
        """What this token adds to the text; empty while a sign is not whole."""
        if token in self._hidden:
            return ""
        self._ids.append(token)
        new = self._new()
        if not new or new.endswith(BROKEN):
            return ""
        self._from, self._told = self._told, len(self._ids)
        return new

    def told(self, text: str) -> str:
        """A token's text that was told with it. What comes next follows it as it would follow a letter."""
        if text:
            self._ids = self._tokenizer("a", add_special_tokens=False)["input_ids"][-1:]
            self._from, self._told = 0, len(self._ids)
        return text

    def rest(self) -> str:
        """What is left after the last token."""
        new = self._new()
        self._from, self._told = self._told, len(self._ids)
        return new

    def _new(self) -> str:
        told = self._text(self._ids[self._from : self._told])
        return self._text(self._ids[self._from :])[len(told) :]

    def _text(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=False)) if ids else ""


def _special(tokenizer: Any) -> set[int]:
    return {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}


class AnswerText:
    """One answer's text: ends at a stop text, and keeps what follows the mark of a tool call apart.

    Attributes:
        stopped: whether a stop text has come. It is not part of the text.
        calls: what follows the mark, the mark included; empty as long as it has not come.
    """

    def __init__(
        self, decoder: Decoder, stops: Sequence[str] = (), mark: str | None = None, bare: bool = False
    ) -> None:
        """Make one.

        Args:
            mark: begins a tool call.
            bare: whether a text that begins with a brace may be a call, too.
        """
        self._decoder, self._stops, self._mark, self._bare = decoder, list(stops), mark, bare
        self._held = ""
        self._begun = False
        self.stopped, self.calls = False, ""

    def add(self, token: int, text: str | None = None) -> str:
        """The text that is certain after this token.

        Args:
            text: the token's own, if it was told with it.
        """
        return self._take(self._decoder.add(token) if text is None else self._decoder.told(text))

    def finish(self) -> str:
        """The rest of the text, after the last token."""
        text = self._take(self._decoder.rest())
        rest, self._held = self._held, ""
        return text + rest

    def _take(self, new: str) -> str:
        if self.stopped or not new:
            return ""
        if self.calls:
            self.calls += new
            return ""
        text, self._held = self._held + new, ""
        if self._bare and not self._begun and text.strip():
            self._begun = True
            if text.lstrip()[0] in "{[":
                self.calls = text
                return ""
        ends = [(text.index(stop), stop) for stop in self._stops if stop in text]
        if ends:
            self.stopped = True
            return text[: min(ends)[0]]
        if self._mark and self._mark in text:
            place = text.index(self._mark)
            self.calls = text[place:]
            return text[:place]
        held = max((_overlap(text, end) for end in [*self._stops, self._mark or ""]), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


def _overlap(text: str, end: str) -> int:
    """How many last letters of the text are the first ones of `end`."""
    return next((n for n in range(min(len(text), len(end)), 0, -1) if text.endswith(end[:n])), 0)


class TokenTexts:
    """What single tokens stand for, for logarithmic probabilities."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._anchor = tokenizer("a", add_special_tokens=False)["input_ids"][-1:]
        self._before = str(tokenizer.decode(self._anchor))

    def __call__(self, token: int) -> tuple[str, list[int]]:
        """A token's text and its bytes in UTF-8. Part of a sign has a text that stands for that."""
        name = str(self._tokenizer.convert_ids_to_tokens(token))
        if byte := BYTE.fullmatch(name):
            return f"bytes:\\x{byte[1].lower()}", [int(byte[1], 16)]
        text = str(self._tokenizer.decode([*self._anchor, token]))[len(self._before) :]
        if BROKEN not in text:
            return text, list(text.encode())
        raw = [_letters().get(letter) for letter in name]
        if None in raw:
            return text, list(text.encode())
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw), [byte for byte in raw if byte is not None]


def _letters() -> dict[str, int]:
    """The bytes that letters stand for in the tokens of byte-level vocabularies."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return {letter: byte for byte, letter in bytes_to_unicode().items()}
