"""What adapters add to a layer's output, each to the tokens of a step that it answers; without a graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from phinetune.engine.kernels.native.operator import Operator, drawn

FEW = 8  # tokens of an adapter; from more on, torch's products gain more than calls cost


@dataclass(frozen=True)
class LowRank:
    """One layer's update: scaling · (x Aᵀ) Bᵀ (LoRA, Hu et al. 2021, section 4.1).

    Attributes:
        a: shape (r, in), in the base's dtype.
        b_t: B transposed, shape (r, out). Its rows are read from beginning to end.
        scaling: alpha / r, or alpha / √r.
    """

    a: Tensor
    b_t: Tensor
    scaling: float


# A layer's update, and the tokens [start, stop) that it is for.
Part = tuple[LowRank, int, int]


def add_low_rank_(out: Tensor, x: Tensor, parts: Sequence[Part]) -> None:
    """Add updates to a layer's output.

    One call computes those of few tokens, whose time would be that of calls. Those of many are torch's products.

    Args:
        out: shape (tokens, out).
        x: the layer's input, shape (tokens, in), of the same dtype as all the matrices.
        parts: no token is in two of them.
    """
    few = [part for part in parts if part[2] - part[1] <= FEW]
    many = [part for part in parts if part[2] - part[1] > FEW]
    for run, some in ((_add_low_rank_, few), (_by_torch, many)):
        if some:
            updates, starts, stops = zip(*some, strict=True)
            a, b_t, scalings = zip(*((one.a, one.b_t, one.scaling) for one in updates), strict=True)
            run(out, x, list(a), list(b_t), list(scalings), list(starts), list(stops))


def _by_torch(
    out: Tensor,
    x: Tensor,
    a: list[Tensor],
    b_t: list[Tensor],
    scalings: list[float],
    starts: list[int],
    stops: list[int],
) -> None:
    for first, second, scaling, start, stop in zip(a, b_t, scalings, starts, stops, strict=True):
        out[start:stop].addmm_(x[start:stop] @ first.t(), second, alpha=scaling)


def _sample(kind: torch.dtype) -> tuple[object, ...]:
    """Four adapters, each with two tokens."""
    out, x, a, b_t = drawn((8, 2048), (8, 2048), (4, 16, 2048), (4, 16, 2048), kind=kind)
    return out, x, list(a / 2048**0.5), list(b_t / 4), [1.0] * 4, [0, 2, 4, 6], [2, 4, 6, 8]


_add_low_rank_ = Operator("add_low_rank_", _by_torch, _sample)
