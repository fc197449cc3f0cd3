"""The product of a few rows with a weight: each step of answers takes one with every weight.

Its time is that of reading the weight from memory. torch's own products of 2 to some 60 rows take several times as long
on many processors; the native form reads the weight once. It rounds in another order. So only steps of answers take it:
scoring computes as training does, to the bit.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch
from torch import Tensor

from phinetune.engine.kernels.native.operator import Operator, drawn, rows_of

MOST = 63  # rows; from 64 on, products of half precision go through float32 by blocks, and those of float32 are fast
# Where the processor has products of half precision, these are faster for as few rows, and for fewer if rows are wide.
MOST_WHERE_FAST, LEAST_WHERE_FAST = 8, 3
FEW_NUMBERS = 9216  # of x; measured with widths from 576 to 8192


class _Here(threading.local):
    """Whether this thread computes a step of answers."""

    steps = False


_here = _Here()


@contextlib.contextmanager
def in_step() -> Iterator[None]:
    """What this thread computes meanwhile is a step of answers."""
    before, _here.steps = _here.steps, True
    try:
        yield
    finally:
        _here.steps = before


def takes(x: Tensor, weight: Tensor, most: int) -> bool:
    """Whether a step of answers is computed, and `few_rows` has a form of its own for these and for so many rows.

    Args:
        x: shape (rows, in).
        weight: shape (out, in).
    """
    if not _here.steps or not 0 < len(x) <= most or torch.is_grad_enabled() or x.device.type != "cpu":
        return False
    operator = _operator(x.dtype, weight.dtype)
    return operator is not None and weight.stride(-1) == 1 and operator.is_native(x)


def most_where_fast(width: int) -> int:
    """How many rows of this width are few where products of half precision are fast."""
    return max(LEAST_WHERE_FAST, min(MOST_WHERE_FAST, FEW_NUMBERS // max(1, width)))


def reads_half() -> bool:
    """Whether products of float32 read a weight that lies in bfloat16 as it lies: half the memory, the same numbers.

    torch has no such product: its form in the trial converts the weight first. What wins against that may be slow all
    the same, so the native product of float32 must have won against torch's own, too.
    """
    return all(operator.is_native(torch.empty(0)) for operator in (_few_rows, _few_rows_of_half))


def few_rows(x: Tensor, weight: Tensor) -> Tensor:
    """`x Wᵀ`, shape (rows, out) in x's dtype, for x of shape (rows, in) and a weight of shape (out, in).

    The weight is in x's dtype, or in bfloat16 where x is in float32.
    """
    out, operator = x.new_empty(len(x), len(weight)), _operator(x.dtype, weight.dtype)
    assert operator is not None, (x.dtype, weight.dtype)
    operator(rows_of(x), weight, out)
    return out


def _operator(dtype: torch.dtype, held: torch.dtype) -> Operator | None:
    """The operator for x of a dtype and a weight that is held in another or in the same; None if there is none."""
    if held == dtype:
        return _few_rows
    return _few_rows_of_half if (dtype, held) == (torch.float32, torch.bfloat16) else None


def _by_torch(x: Tensor, weight: Tensor, out: Tensor) -> None:
    torch.mm(x, weight.to(x.dtype).t(), out=out)


def _sample(kind: torch.dtype) -> tuple[Tensor, ...]:
    x, weight = drawn((MOST_WHERE_FAST, 2048), (2048, 2048), kind=kind)
    return x, weight / 2048**0.5, x.new_empty(len(x), len(weight))


def _sample_of_half(kind: torch.dtype) -> tuple[Tensor, ...]:
    x, weight, out = _sample(kind)
    return x, weight.bfloat16(), out


_few_rows = Operator("few_rows", _by_torch, _sample)
_few_rows_of_half = Operator("few_rows_of_half", _by_torch, _sample_of_half)
