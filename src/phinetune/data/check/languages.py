"""Which languages a set is written in, by py3langid's model, for texts long enough to tell."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from functools import cache
from typing import Any

from phinetune.chat.template import Message

SHORTEST = 60  # letters: below it the guess is poor
SURE = 0.9
LOOKED_AT = 2_000  # chats; a millisecond each
READ = 800  # characters of a text that are read
_CODE = re.compile(r"```.*?(?:```|$)|`[^`\n]*`|https?://\S+", re.DOTALL)


@cache
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True, min_confidence=SURE)


def language_of(text: str) -> str | None:
    """The two-letter code of a text's language; None where it is too short or too mixed to tell."""
    words = _CODE.sub(" ", text[:READ])
    if sum(letter.isalpha() for letter in words) < (SHORTEST if words.isascii() else SHORTEST // 2):
        return None
    code, _ = _identifier().classify(words)
    return None if code in ("und", "zxx") else str(code)  # undetermined; no language at all


class Languages:
    """Counts languages chat by chat."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.chats = 0

    def add(self, messages: Sequence[Message]) -> str | None:
        """Count a chat by its answers; what is odd about its languages, or None."""
        if self.chats >= LOOKED_AT:
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
