"""Where conversations lie in a packed row of tokens: a forest of segments.

A segment is a run of tokens. Its tokens see all of its ancestors' and, causally, its own. Conversations that share
nothing are roots. Conversations that begin alike are branches over a shared root:

    tokens      S S S S A A A B B       S: shared system prompt, A and B: two conversations' own tokens
    positions   0 1 2 3 4 5 6 4 5
    segments    (0, 4, -1)  (4, 7, 0)  (7, 9, 0)        start, stop, parent
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Range = tuple[int, int]

ALIKE = 0.7  # segments at least this long, measured by the longest, are padded to it and computed together


@dataclass(frozen=True)
class Segment:
    """Tokens [start, stop) of the row, which see the ranges of `above` (oldest first) and themselves causally."""

    start: int
    stop: int
    above: tuple[Range, ...] = ()

    def __len__(self) -> int:
        return self.stop - self.start

    def moved(self, by: int) -> Segment:
        """The same segment where the row is cut off `-by` tokens from its start."""
        return Segment(self.start + by, self.stop + by, tuple((start + by, stop + by) for start, stop in self.above))


@dataclass(frozen=True)
class Group:
    """Segments under one parent and of like length, padded at their ends to the longest.

    Attributes:
        above: what they all see before their own tokens.
        own: each segment's tokens, shape (segments, longest); the first one's again where it has ended.
        there: which of `own` are tokens; None where all are.
    """

    above: tuple[Range, ...]
    own: Tensor
    there: Tensor | None

    @property
    def before(self) -> int:
        """Tokens above."""
        return sum(stop - start for start, stop in self.above)


def read_segments(table: Tensor) -> list[Segment]:
    """Segments of a table (n, 3) of start, stop and parent's index (-1: none); parents stand before children."""
    paths: list[tuple[Range, ...]] = []
    segments = []
    for start, stop, parent in table.tolist():
        above = paths[parent] if parent >= 0 else ()
        paths.append((*above, (start, stop)))
        segments.append(Segment(start, stop, above))
    return segments


def group(segments: Sequence[Segment], device: torch.device) -> list[Group]:
    """Segments that are computed together: attention over many short ones is a few wide products."""
    families: dict[tuple[Range, ...], list[Segment]] = {}
    for segment in segments:
        families.setdefault(segment.above, []).append(segment)
    return [_padded(alike, device) for family in families.values() for alike in _alike(family)]


def _alike(family: Sequence[Segment]) -> Iterator[list[Segment]]:
    alike: list[Segment] = []
    for segment in sorted(family, key=len, reverse=True):
        if alike and len(segment) < ALIKE * len(alike[0]):
            yield alike
            alike = []
        alike.append(segment)
    yield alike


def _padded(segments: Sequence[Segment], device: torch.device) -> Group:
    longest = len(segments[0])
    starts = torch.tensor([segment.start for segment in segments])[:, None]
    lengths = torch.tensor([len(segment) for segment in segments])[:, None]
    place = torch.arange(longest)
    there = place < lengths
    own = torch.where(there, starts + place, starts)
    return Group(segments[0].above, own.to(device), None if bool(there.all()) else there.to(device))
