"""Texts with tags of their own, as `### Response:`: where their answers stand.

An answer begins behind its tag, and behind the line ends that follow the tag: a prompt ends with them in use, too, so
that its tokens are those of training. Without an instruction tag, the last response tag of a text counts. With one,
each answer goes up to the next instruction tag, and a text may hold several; a response tag inside an answer is part
of it. TRL's collator for completions and Unsloth's `train_on_responses_only` read such texts in the same way.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from phinetune.chats.template import Message
from phinetune.config.data import DataSection
from phinetune.errors import RowError

PLAIN = "text"  # the role of a prompt that is no turn, but the text before the last answer as it stands


def tags_of(section: DataSection) -> ResponseTags | None:
    """What the section `data` says of the answers in texts; None if it says nothing."""
    return ResponseTags(section.response, section.instruction) if section.response else None


@dataclass(frozen=True)
class ResponseTags:
    """How the answers in a text are found.

    Attributes:
        response: what stands before an answer.
        instruction: what stands before the next question; None if a text has one answer.
    """

    response: str
    instruction: str | None = None

    @cached_property
    def _begin(self) -> re.Pattern[str]:
        return re.compile(re.escape(self.response) + r"(?:[ \t]*\r?\n)*")

    def spans(self, text: str) -> list[tuple[int, int]]:
        """Where each answer begins and ends, in characters.

        Raises:
            RowError: no response tag is there, or nothing stands behind the last one.
        """
        starts = [found.end() for found in self._begin.finditer(text)]
        if not starts:
            raise RowError(f"the text does not hold {self.response!r} (data.response)", "response")
        spans = self._several(text, starts) if self.instruction else [(starts[-1], len(text))]
        start, end = spans[-1]
        if not text[start:end].strip():
            raise RowError(f"nothing stands behind the last {self.response!r} (data.response)", "response")
        return [(start, end) for start, end in spans if text[start:end].strip()]

    def _several(self, text: str, starts: Sequence[int]) -> list[tuple[int, int]]:
        spans: list[tuple[int, int]] = []
        for start in starts:
            if spans and start < spans[-1][1]:
                continue
            end = text.find(self.instruction or "", start)
            spans.append((start, end if end >= 0 else len(text)))
        return spans

    def chat(self, text: str, ends: Sequence[str]) -> list[Message]:
        """The text as a prompt and its last answer, without the end tokens behind the answer.

        Args:
            ends: the tokens that end an answer.

        Raises:
            RowError: see `spans`.
        """
        start, end = self.spans(text)[-1]
        answer = text[start:end].strip()
        while cut := next((token for token in ends if token and answer.endswith(token)), ""):
            answer = answer.removesuffix(cut).rstrip()
        return [{"role": PLAIN, "content": text[:start]}, {"role": "assistant", "content": answer}]

    def prompt(self, text: str) -> list[Message] | None:
        """A text that ends where an answer is to begin, as a prompt; None if it does not end with the tag."""
        found = list(self._begin.finditer(text))
        return [{"role": PLAIN, "content": text}] if found and not text[found[-1].end() :].strip() else None
