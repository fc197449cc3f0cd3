"""Ways to compute attention by matrix products, and which is fastest on the processor at hand.

A way says how many queries a block has and how many scores are held at a time. A small block computes few scores above
the diagonal; a large one multiplies faster. Many key heads together take few calls of operators, but torch copies
their keys for each block; one key head alone takes more calls, which read the keys where they lie. What pays depends
on the length, on the processor's products, its caches and its threads. So the ways are timed when a length is met for
the first time on a machine (`kept_choices`).
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


MAX_SCORES = 1 << 20  # of key heads that are computed together: 2 MB in bfloat16, 4 MB in float32
SHORT = 128  # tokens; segments up to this length are computed whole on every processor
LONG = 1024  # tokens; longer segments are usually computed one key head at a time
TIMED = 2048  # tokens; longer segments are computed as these are
# A way is preferred to the usual one if that takes at least this many times as long. Rounding differs with the way, so
# a narrow gain would not pay for two runs with the same seed that are not the same to the bit.
MIN_GAIN = 1.2
ROUNDS = 3


def together(queries: int) -> Way:
    """As many key heads together as their scores allow, in blocks of so many tokens."""
    return Way(queries, MAX_SCORES)


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
        return each(256)
    return min(TIMED, 1 << (length - 1).bit_length())


def candidates(length: int) -> list[Way]:
    """The ways for segments of `length` tokens, the usual one first."""
    if length > LONG:
        return [each(256), each(512), together(128)]
    return [together(128), together(64), together(256), each(256)]


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
