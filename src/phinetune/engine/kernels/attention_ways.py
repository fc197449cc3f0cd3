"""Ways to compute attention by matrix products, and which is fastest on the processor at hand.

A way says how many queries a block has and how many scores are held at a time. Short segments are computed whole,
many key heads together, in one batch of products: with them each call of an operator costs more than the scores above
the diagonal. Long segments are computed one key head at a time in blocks of queries. Where one ends and the other
begins depends on the processor's products, its caches and its threads, so between the two both are timed once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch

from phinetune.engine.attention_plan import Heads

Choice = TypeVar("Choice")


@dataclass(frozen=True)
class Way:
    """How attention within segments is cut into parts.

    Attributes:
        queries: how many tokens' queries a block has, at most.
        scores: how many scores are held at a time. A part has one key head at least.
    """

    queries: int
    scores: int


MAX_SCORES = 1 << 20  # of a batch of products: 2 MB in bfloat16, 4 MB in float32
SHORT = 128  # tokens; segments up to this length are computed whole on every processor
LONG = 1024  # tokens; longer segments are never computed whole
TIMED = 2048  # tokens; longer segments are computed as these are
MIN_GAIN = 1.1  # a way is preferred to the usual one if that takes at least this many times as long
ROUNDS = 3


def together(length: int) -> Way:
    """Segments of up to `length` tokens whole, and as many key heads together as their scores allow."""
    return Way(length, MAX_SCORES)


def each(queries: int) -> Way:
    """One key head at a time, in blocks of so many tokens."""
    return Way(queries, 1)


def kind(length: int, device: torch.device, crossed: bool) -> Way | int:
    """The way for segments of `length` tokens where it is known; else the length by which it is measured.

    Args:
        crossed: whether the segments are longer than the sliding window.
    """
    if length <= SHORT:
        return together(SHORT)
    if crossed or device.type != "cpu":
        return each(512)
    return min(TIMED, 1 << (length - 1).bit_length())


def candidates(length: int) -> list[Way]:
    """The ways for segments of `length` tokens, the usual one first."""
    if length > LONG:
        return [each(512), each(256)]
    ways = [together(length), each(512), each(256)]
    return ways if length <= 512 else [each(512), together(length), each(256)]


def sample(length: int, heads: Heads) -> Heads:
    """So many of the heads that one segment of `length` tokens fills the scores that are held at a time."""
    few = min(heads.kv_heads, max(1, MAX_SCORES // (heads.shared * length * length)))
    return replace(heads, heads=few * heads.shared, kv_heads=few, window=None)


def fastest(ways: Sequence[Choice], seconds: Callable[[Choice], float]) -> Choice:
    """The first of the ways, or the fastest if it is faster by a clear margin. Each is timed in turn, several times."""
    taken = {way: float("inf") for way in ways}
    for turn in range(ROUNDS + 1):
        for way in ways:
            found = seconds(way)
            if turn:  # the first time also sets up the products, so it is not counted
                taken[way] = min(taken[way], found)
    best = min(ways, key=taken.__getitem__)
    return best if taken[ways[0]] > MIN_GAIN * taken[best] else ways[0]
