"""How conversations lie in a packed row of tokens: as a forest of segments.

A segment is a run of tokens. Its tokens see all tokens of its ancestors and, causally, its own. A conversation that
shares nothing is a root. Conversations that begin with the same tokens are branches of a shared root:

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

SHORTEST_SHARED = 16  # tokens; computing fewer tokens again costs less than the products of one more segment
PADDED = 512  # tokens; longer segments are not padded: their scores cost more than a product for each
LEAST_RATIO = 0.7  # segments with at least this share of the longest one's length are padded and computed with it


@dataclass(frozen=True)
class Segment:
    """Tokens [start, stop) of the row.

    They see the tokens in the ranges `above`, which are the ancestors' from the root down, and causally their own.
    """

    start: int
    stop: int
    above: tuple[Range, ...] = ()

    def __len__(self) -> int:
        return self.stop - self.start

    def moved(self, by: int) -> Segment:
        """The same segment, with `by` added to all its positions."""
        return Segment(self.start + by, self.stop + by, tuple((start + by, stop + by) for start, stop in self.above))


@dataclass(frozen=True)
class Group:
    """Segments of the same parent and of similar length, padded at their ends to the longest.

    Attributes:
        above: the ranges that all of them see before their own tokens.
        own: the positions of each segment's tokens, shape (segments, longest). Padding repeats the first position.
        real: which entries of `own` are tokens, shape (segments, longest); None if none is padding.
    """

    above: tuple[Range, ...]
    own: Tensor
    real: Tensor | None

    @property
    def before(self) -> int:
        """How many tokens the ranges `above` have."""
        return sum(stop - start for start, stop in self.above)


def read_segments(table: Tensor) -> list[Segment]:
    """The segments in a table of start, stop and the parent's index, shape (segments, 3).

    The index -1 is no parent. A parent stands before its children.
    """
    paths: list[tuple[Range, ...]] = []
    segments = []
    for start, stop, parent in table.tolist():
        above = paths[parent] if parent >= 0 else ()
        paths.append((*above, (start, stop)))
        segments.append(Segment(start, stop, above))
    return segments


def group_segments(segments: Sequence[Segment], device: torch.device) -> list[Group]:
    """Group the segments that are computed together. Then attention over many short ones takes a few large products."""
    families: dict[tuple[Range, ...], list[Segment]] = {}
    for segment in segments:
        families.setdefault(segment.above, []).append(segment)
    return [_padded(similar, device) for family in families.values() for similar in _by_length(family)]


def _by_length(family: Sequence[Segment]) -> Iterator[list[Segment]]:
    """Segments of similar length together, the longest first."""
    similar: list[Segment] = []
    for segment in sorted(family, key=len, reverse=True):
        ratio = LEAST_RATIO if similar and len(similar[0]) <= PADDED else 1
        if similar and len(segment) < ratio * len(similar[0]):
            yield similar
            similar = []
        similar.append(segment)
    yield similar


def _padded(segments: Sequence[Segment], device: torch.device) -> Group:
    longest = len(segments[0])
    starts = torch.tensor([segment.start for segment in segments])[:, None]
    lengths = torch.tensor([len(segment) for segment in segments])[:, None]
    place = torch.arange(longest)
    real = place < lengths
    own = torch.where(real, starts + place, starts)
    return Group(segments[0].above, own.to(device), None if bool(real.all()) else real.to(device))
