"""The neutral set: chats on which a model is measured for what it forgot, and prompts whose answers are replayed.

All texts were written for this package; they may be used as CC0. `scored.jsonl` and `prompts.jsonl` share no prompt, so
nothing that is replayed is scored. `scored.jsonl` is spread: any beginning of it holds all tags in like shares.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from phinetune.chats.template import Message


@dataclass(frozen=True)
class NeutralRow:
    """A chat of one exchange.

    Attributes:
        tag: everyday, knowledge, arithmetic, code, chinese or refusal; of a user's own set the file's name.
        expect: a pattern that a right answer contains, in whatever case; None if no pattern tells that.
    """

    tag: str
    messages: tuple[Message, ...]
    expect: str | None = None


@cache
def shipped_rows() -> tuple[NeutralRow, ...]:
    """The chats that are scored."""
    return tuple(NeutralRow(row["tag"], tuple(row["messages"]), row.get("expect")) for row in _lines("scored.jsonl"))


@cache
def shipped_prompts() -> tuple[str, ...]:
    """The messages whose answers by the base itself are replayed."""
    return tuple(row["prompt"] for row in _lines("prompts.jsonl"))


def _lines(name: str) -> Iterator[dict[str, Any]]:
    text = files("phinetune.data.neutral").joinpath(name).read_text(encoding="utf-8")
    return (json.loads(line) for line in text.splitlines())
