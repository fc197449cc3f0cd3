"""Where conversations lie in a packed row of tokens: a forest of segments.

A segment is a run of tokens. Its tokens see all of its ancestors' and, causally, its own. Conversations that share
nothing are roots. Conversations that begin alike are branches over a shared root:

    tokens      S S S S A A A B B       S: shared system prompt, A and B: two conversations' own tokens
    positions   0 1 2 3 4 5 6 4 5
    segments    (0, 4, -1)  (4, 7, 0)  (7, 9, 0)        start, stop, parent
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

Range = tuple[int, int]


@dataclass(frozen=True)
class Segment:
    """Tokens [start, stop) of the row, which see the ranges of `above` (oldest first) and themselves causally."""

    start: int
    stop: int
    above: tuple[Range, ...] = ()

    @property
    def ranges(self) -> tuple[Range, ...]:
        """All that the last token sees, adjacent ranges joined."""
        joined: list[Range] = []
        for start, stop in (*self.above, (self.start, self.stop)):
            if joined and joined[-1][1] == start:
                joined[-1] = (joined[-1][0], stop)
            else:
                joined.append((start, stop))
        return tuple(joined)

    def moved(self, by: int) -> Segment:
        """The same segment where the row is cut off `-by` tokens from its start."""
        return Segment(self.start + by, self.stop + by, tuple((start + by, stop + by) for start, stop in self.above))


def read_segments(table: Tensor) -> list[Segment]:
    """Segments of a table (n, 3) of start, stop and parent's index (-1: none); parents stand before children."""
    return list(_walk(table.tolist()))


def _walk(rows: list[list[int]]) -> Iterator[Segment]:
    paths: list[tuple[Range, ...]] = []
    for start, stop, parent in rows:
        above = paths[parent] if parent >= 0 else ()
        paths.append((*above, (start, stop)))
        yield Segment(start, stop, above)
