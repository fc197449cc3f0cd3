"""How many tokens two rendered texts share, without encoding what they share a second time.

A text's tokens up to one of the template's control tokens do not depend on what follows it. So of the shorter text
only the part from its last control token that the longer one has too is encoded, most often a reply's header: the
same few letters for every chat of a batch.
"""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from phinetune.chat.control import ControlTokens, control_tokens
from phinetune.chat.template import common_prefix, tokenize


def shared_tokens(
    tokenizer: PreTrainedTokenizerBase,
    wholes: Sequence[str],
    ids: Sequence[list[int]],
    bounds: Sequence[Sequence[str]],
) -> list[list[int]]:
    """For each whole text, how many of its leading tokens each of its bounds shares.

    Args:
        ids: the tokens of each whole text.
        bounds: texts that begin like the whole text, as many as there are.
    """
    control = control_tokens(tokenizer)
    parts = []
    for whole, tokens, texts in zip(wholes, ids, bounds, strict=True):
        # A masked text goes through another tokenizer, where the places below would be others.
        anchors = [] if not texts or ControlTokens.is_masked(whole) else control.anchors(whole, tokens)
        parts.append([_rest(text, whole, anchors) for text in texts])
    rests = list(dict.fromkeys(rest for part in parts for rest, _ in part))
    known = dict(zip(rests, tokenize(tokenizer, rests), strict=True))
    return [
        [place + common_prefix(known[rest], tokens[place : place + len(known[rest])]) for rest, place in part]
        for part, tokens in zip(parts, ids, strict=True)
    ]


def _rest(bound: str, whole: str, anchors: Sequence[tuple[int, int, int]]) -> tuple[str, int]:
    """The part of `bound` from the last control token that both texts have, and that token's place in the whole's."""
    common = _common_letters(bound, whole)
    for first, behind, place in reversed(anchors):
        if behind <= common:
            return bound[first:], place
    return bound, 0


def _common_letters(left: str, right: str) -> int:
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
