"""Recognises the languages of chats, by py3langid's model. Texts that are too short are not counted."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from functools import cache
from typing import Any

from phinetune.chats.template import Message

MIN_LETTERS = 60  # of a text; with fewer letters the model is often wrong
MIN_CONFIDENCE = 0.9  # of the model's answer, from 0 to 1
MAX_CHATS = 2_000  # only these first chats are examined, which takes one millisecond each
MAX_CHARACTERS = 800  # of a text; the rest is not read
_CODE = re.compile(r"```.*?(?:```|$)|`[^`\n]*`|https?://\S+", re.DOTALL)


@cache
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True, min_confidence=MIN_CONFIDENCE)


def language_of(text: str) -> str | None:
    """The two-letter code of a text's language. None if the text is too short, or its language is not clear."""
    words = _CODE.sub(" ", text[:MAX_CHARACTERS])
    if sum(letter.isalpha() for letter in words) < (MIN_LETTERS if words.isascii() else MIN_LETTERS // 2):
        return None
    code, _ = _identifier().classify(words)
    return None if code in ("und", "zxx") else str(code)  # undetermined; no linguistic content


class Languages:
    """Counts the languages of chats.

    Attributes:
        counts: how many chats have answers in each language.
        chats: how many chats were examined.
    """

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.chats = 0

    def add(self, messages: Sequence[Message]) -> str | None:
        """Count a chat by the language of its answers.

        Returns:
            a note if the answers have another language than the questions, else None.
        """
        if self.chats >= MAX_CHATS:
            return None
        self.chats += 1
        answers = [m["content"] for m in messages if m["role"] == "assistant"]
        answered = language_of(" ".join(answers))
        if answered is None:
            return None
        self.counts[answered] += 1
        asked = language_of(" ".join(m["content"] for m in messages if m["role"] == "user"))
        if asked is None or asked == answered:
            return None
        return f"question {asked}, answer {answered}"
