"""Counts the leading tokens that two rendered texts share, without encoding their common part twice.

A text's tokens before one of the template's control tokens do not depend on what follows it. So only a part of the
shorter text is encoded: from the last control token that the longer text has too. Usually this part is the header of
a reply, which is the same few letters for every chat of a batch.
"""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from phinetune.chats.control import ControlTokens, control_tokens
from phinetune.chats.template import tokenize
from phinetune.engine.examples import common_prefix


def shared_tokens(
    tokenizer: PreTrainedTokenizerBase,
    wholes: Sequence[str],
    ids: Sequence[list[int]],
    bounds: Sequence[Sequence[str]],
) -> list[list[int]]:
    """For each whole text, how many leading tokens it shares with each of its bounds.

    Args:
        wholes: rendered texts.
        ids: the token ids of each whole text.
        bounds: for each whole text, any number of texts that begin like it.
    """
    control = control_tokens(tokenizer)
    parts = []
    for whole, tokens, texts in zip(wholes, ids, bounds, strict=True):
        # The twin encodes a masked text, so the places of its tokens would be different.
        anchors = [] if not texts or ControlTokens.is_masked(whole) else control.anchors(whole, tokens)
        parts.append([_rest(text, whole, anchors) for text in texts])
    rests = list(dict.fromkeys(rest for part in parts for rest, _ in part))
    known = dict(zip(rests, tokenize(tokenizer, rests), strict=True))
    return [
        [place + common_prefix(known[rest], tokens[place : place + len(known[rest])]) for rest, place in part]
        for part, tokens in zip(parts, ids, strict=True)
    ]


def _rest(bound: str, whole: str, anchors: Sequence[tuple[int, int, int]]) -> tuple[str, int]:
    """The part of `bound` that has to be encoded, and where it begins among the tokens of the whole text.

    It begins with the last control token that both texts have. If there is none, it is all of `bound`.
    """
    common = _common_letters(bound, whole)
    for start, end, place in reversed(anchors):
        if end <= common:
            return bound[start:], place
    return bound, 0


def _common_letters(left: str, right: str) -> int:
    """How many leading letters two texts share, by bisection."""
    if right.startswith(left):
        return len(left)
    low, high = 0, min(len(left), len(right))
    while low < high:
        middle = (low + high + 1) // 2
        if left[low:middle] == right[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
