"""Rows of a step dealt out by their tokens, so that no process waits for one that drew the long ones.

A step's gradient is a sum over its rows, divided by the items of all of them. So it does not matter which process
computes which row. Each step has the rows that it would have anyway, in another order within the step.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from torch.utils.data import Sampler

CLOSE = 1.002  # times the mean: when the longest share is no longer, no more rows change places
Lengths = np.ndarray[tuple[int], np.dtype[np.int64]]


@dataclass(frozen=True)
class StepShape:
    """How the rows of a step are cut.

    Attributes:
        batch: rows of a micro-batch.
        processes: how many take a micro-batch each, at the same time.
        accumulation: how many micro-batches each of them takes.
    """

    batch: int
    processes: int
    accumulation: int

    @property
    def rows(self) -> int:
        """The rows of a step."""
        return self.batch * self.processes * self.accumulation


def step_shape(args: Any) -> StepShape:
    """The steps of a run with these arguments of transformers."""
    return StepShape(args.per_device_train_batch_size, max(1, args.world_size), args.gradient_accumulation_steps)


def balanced(rows: Sequence[int], lengths: Lengths, shape: StepShape) -> list[int]:
    """The rows of a step in an order in which the processes get alike many tokens, and so do their micro-batches.

    The processes take micro-batches in turn. Long rows are dealt first, each to the process that has the fewest tokens
    and room for it (Graham 1969, longest processing time first). Then rows change places in pairs for as long as that
    makes the longest share shorter. Within a process so again for its micro-batches.
    Rows that fill no micro-batch for every process stay where they are.

    Args:
        rows: their places in the set.
        lengths: the tokens of each row of the set, shape (rows).
    """
    together = shape.batch * shape.processes
    rounds = len(rows) // together
    whole, rest = rows[: rounds * together], rows[rounds * together :]
    if shape.processes == 1 or not rounds:
        return list(rows)
    of_processes = _dealt(whole, lengths, shape.processes, rounds * shape.batch)
    batches = [_dealt(own, lengths, rounds, shape.batch) for own in of_processes]
    ordered = [row for number in range(rounds) for own in batches for row in own[number]]
    return [*ordered, *rest]


def _dealt(rows: Sequence[int], lengths: Lengths, hands: int, room: int) -> list[list[int]]:
    """Rows dealt out to so many hands, as many to each as it has room for, of alike many tokens."""
    dealt: list[list[int]] = [[] for _ in range(hands)]
    waiting = [(0, hand) for hand in range(hands)]  # a heap of those with room: their tokens, and which hand it is
    for row in sorted(rows, key=lambda row: -int(lengths[row])):
        tokens, hand = heapq.heappop(waiting)
        dealt[hand].append(row)
        if len(dealt[hand]) < room:
            heapq.heappush(waiting, (tokens + int(lengths[row]), hand))
    return _exchanged(np.array(dealt), lengths)


def _exchanged(dealt: np.ndarray[tuple[int, int], np.dtype[np.int64]], lengths: Lengths) -> list[list[int]]:
    """Hands, shape (hands, room), after exchanges of two rows; each takes some tokens from the hand with the most.

    Both of its hands have fewer tokens after it than that one had before, so that exchanges come to an end.
    """
    while (tokens := lengths[dealt].sum(1)).max() > CLOSE * tokens.mean():
        most = int(tokens.argmax())
        gaps = lengths[dealt[most]][:, None, None] - lengths[dealt]  # tokens that go over: (room, hands, room)
        fuller = np.maximum(tokens[most] - gaps, tokens[:, None] + gaps)  # of the two hands after the exchange
        own, hand, other = np.unravel_index(fuller.argmin(), fuller.shape)
        if fuller[own, hand, other] >= tokens[most]:
            break
        dealt[most, own], dealt[hand, other] = dealt[hand, other], dealt[most, own]
    return dealt.tolist()


class WithinSteps(Sampler[int]):
    """The rows of another sampler, in another order within each step.

    Attributes:
        sampler: the other one.
    """

    def __init__(self, sampler: Any, lengths: Lengths, shape: StepShape) -> None:
        self.sampler, self.lengths, self.shape = sampler, lengths, shape

    def __iter__(self) -> Iterator[int]:
        rows: Iterable[int] = iter(self.sampler)
        while step := list(islice(rows, self.shape.rows)):
            yield from balanced(step, self.lengths, self.shape)

    def __len__(self) -> int:
        return len(self.sampler)

    def set_epoch(self, epoch: int) -> None:
        """Let the other sampler draw the rows of this epoch."""
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(epoch)


def batches_of(loader: Any) -> Any:
    """The batch sampler at the bottom of a loader: each of several processes has a part of its batches."""
    batches = loader.batch_sampler
    while hasattr(batches, "batch_sampler"):
        batches = batches.batch_sampler
    return batches


def holder_of_rows(loader: Any) -> Any:
    """What holds, as its `sampler`, the one that draws a loader's rows: the batch sampler, or what reorders steps."""
    holder = batches_of(loader)
    while isinstance(holder.sampler, WithinSteps):
        holder = holder.sampler
    return holder
