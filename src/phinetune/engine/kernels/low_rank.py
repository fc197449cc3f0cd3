"""What adapters add to a layer's output, each to the tokens of a step that it answers; without a graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from phinetune.engine.kernels.native.operator import Operator, drawn

FEW = 8  # tokens of an adapter; with more, torch's products are faster than one call is cheap


class Update(NamedTuple):
    """scaling · (x Aᵀ) Bᵀ (LoRA, Hu et al. 2021, section 4.1) for some tokens.

    Attributes:
        a: shape (r, in).
        b_t: B transposed, shape (r, out). Its rows are read from beginning to end.
        scaling: alpha / r, or alpha / √r.
        start, stop: the tokens.
    """

    a: Tensor
    b_t: Tensor
    scaling: float
    start: int
    stop: int


def add_low_rank_(out: Tensor, x: Tensor, updates: Sequence[Update]) -> None:
    """Add the updates to a layer's output.

    One call computes those of few tokens, whose time would be that of calls. Those of many are torch's products.

    Args:
        out: shape (tokens, out).
        x: the layer's input, shape (tokens, in), of the same dtype as all the matrices.
    """
    few = [update for update in updates if update.stop - update.start <= FEW]
    many = [update for update in updates if update.stop - update.start > FEW]
    for run, some in ((_add_low_rank_, few), (_by_torch, many)):
        if some:
            a, b_t, scalings, starts, stops = (list(part) for part in zip(*some, strict=True))
            run(out, x, a, b_t, scalings, starts, stops)


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
