"""Matrix products on a CPU, half precision taken through float32 where that is faster.

Few processors multiply bfloat16 faster than float32 (with AMX, say); the others take up to many times as long, some
that have instructions for it included. There the factors are converted a block at a time, added up in float32, as
every product of bfloat16 is, and the sum is rounded once. Weights stay as small as they are.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

HALF = (torch.bfloat16, torch.float16)
BLOCK = 3 << 21  # elements of a weight converted at a time: 24 MB in float32
ROWS = 4096  # of the other factor, and of a block at most
FEW = 64  # rows of a product below which converting the weight costs more than it saves
GAIN = 1.2  # times as long as float32 that a half-precision product takes at least to be worth converting

# A matrix's rows in blocks of at most so many elements (None: in one), in a dtype: each with where it lies, and good
# until the next one.
Blocks = Callable[[int | None, torch.dtype], Iterator[tuple[slice, Tensor]]]


def work_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which products of `x` are taken: its own, or float32 where that is faster."""
    half = x.dtype in HALF and x.device.type == "cpu" and is_slow(x.dtype)
    return torch.float32 if half else x.dtype


def is_wide(x: Tensor) -> bool:
    """Whether the product of `x`, shape (rows, in), with a weight goes through float32."""
    return len(x) >= FEW and work_dtype(x) is not x.dtype


@functools.lru_cache
def is_slow(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies `dtype` more slowly than float32; timed once a process, some 50 ms."""
    return _seconds(dtype) > GAIN * _seconds(torch.float32)


def _seconds(dtype: torch.dtype) -> float:
    """The least time of a product of 512 × 1024 by 1024 × 1024."""
    left, right = torch.ones(512, 1024, dtype=dtype), torch.ones(1024, 1024, dtype=dtype)
    taken = []
    for _ in range(4):  # the first one sets up
        start = time.perf_counter()
        torch.mm(left, right)
        taken.append(time.perf_counter() - start)
    return min(taken[1:])


class _Scratch(threading.local):
    """Memory for what is converted, kept for the next time: fresh pages would take longer than the conversion."""

    def __init__(self) -> None:
        self.held: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}

    def __call__(self, use: str, rows: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Uninitialised, shape (rows, width); on a CPU overwritten by the next call for the same use."""
        if device.type != "cpu":  # whose allocator keeps memory for the next time itself
            return torch.empty(rows, width, dtype=dtype, device=device)
        key, size = (use, dtype, device), rows * width
        if key not in self.held or len(self.held[key]) < size:
            with torch.inference_mode(False):  # a tensor made in that mode could not be written outside of it
                self.held[key] = torch.empty(size, dtype=dtype, device=device)
        return self.held[key][:size].view(rows, width)


scratch = _Scratch()  # a use's memory: scratch("sum", rows, width, dtype, device)


def blocks(weight: Tensor, most: int | None, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """`Blocks` of a tensor (rows, width)."""
    for rows in cut(weight.shape[0], weight.shape[1], most):
        yield rows, widened(weight[rows], dtype, "weight")


def cut(rows: int, width: int, most: int | None) -> Iterator[slice]:
    """Runs of rows with at most `most` elements each and no more than `ROWS` rows; None: all rows."""
    step = rows if most is None else max(1, min(ROWS, most // width))
    for start in range(0, rows, step or 1):
        yield slice(start, min(start + step, rows))


def parts(x: Tensor) -> Iterator[slice]:
    """The rows of `x` that are multiplied at a time; a GPU takes all at once."""
    return cut(len(x), 1, ROWS if x.device.type == "cpu" else None)


def block_size(x: Tensor) -> int | None:
    """Elements of a weight that are expanded at a time for a product with `x`."""
    return BLOCK if x.device.type == "cpu" else None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x Wᵀ + b` of x (…, in) and a frozen weight (out, in), differentiable in x."""
    if torch.is_autocast_enabled(x.device.type):
        kind = torch.get_autocast_dtype(x.device.type)
        x, weight, bias = x.to(kind), weight.to(kind), None if bias is None else bias.to(kind)
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    if weight.requires_grad or weight.dtype != x.dtype or not is_wide(rows):
        return torch.nn.functional.linear(x, weight, bias)
    return expanded(x, functools.partial(blocks, weight), weight.shape[0], bias)


def expanded(x: Tensor, weight: Blocks, out: int, bias: Tensor | None = None) -> Tensor:
    """`linear` for a weight of `out` rows given by its blocks."""
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    made: Tensor = _Expanded.apply(rows, weight, out, bias)  # type: ignore[no-untyped-call]
    return made if x.dim() == 2 else made.view(*x.shape[:-1], out)


class _Expanded(torch.autograd.Function):
    """Keeps nothing but where the weight comes from."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Blocks, out: int, bias: Tensor | None) -> Tensor:
        ctx.weight, ctx.width = weight, x.shape[1]
        made, work = x.new_empty(len(x), out), work_dtype(x)
        for part in parts(x):
            wide = widened(x[part], work, "left")
            for rows, block in weight(block_size(x), work):
                settle(product(wide, block.t(), made[part, rows]), made[part, rows])
        return made if bias is None else made.add_(bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        dx, work = grad.new_empty(len(grad), ctx.width), work_dtype(grad)
        for part in parts(grad):
            total = zeros(dx[part], work)
            for rows, block in ctx.weight(block_size(grad), work):
                total.addmm_(widened(grad[part, rows], work, "gradient"), block)
            settle(total, dx[part])
        return dx, None, None, grad.sum(0) if ctx.needs_input_grad[3] else None


def widened(x: Tensor, dtype: torch.dtype, use: str) -> Tensor:
    """`x` in another dtype, in the scratch memory of that use."""
    if x.dtype == dtype:
        return x
    return scratch(use, len(x), x.shape[1], dtype, x.device).copy_(x)


def product(left: Tensor, right: Tensor, into: Tensor) -> Tensor:
    """`left right`: in `into` where that has their dtype, else in scratch memory; `settle` brings it there."""
    if into.dtype != left.dtype:
        into = scratch("product", left.shape[0], right.shape[1], left.dtype, left.device)
    return torch.mm(left, right, out=into)


def zeros(into: Tensor, dtype: torch.dtype) -> Tensor:
    """Where a sum for `into`, shape (rows, width), is added up in `dtype`: there, or in scratch memory."""
    if into.dtype != dtype:
        into = scratch("sum", len(into), into.shape[1], dtype, into.device)
    return into.zero_()


def settle(made: Tensor, into: Tensor) -> None:
    """Round what was made in scratch memory into its place."""
    if made.data_ptr() != into.data_ptr():
        into.copy_(made)
