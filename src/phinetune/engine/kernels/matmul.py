"""Matrix products on a CPU. Half-precision products go through float32 where that is faster.

Few processors multiply bfloat16 faster than float32; those with AMX do. The others take up to many times as long,
even some that have instructions for bfloat16. On those processors this module converts the factors to float32 a block
at a time, adds the products up in float32, as every bfloat16 product is added up, and rounds the sum once. The weights
stay in memory in their own dtype.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from phinetune.engine.kernels import few_rows

HALF_DTYPES = (torch.bfloat16, torch.float16)
BLOCK_ELEMENTS = 3 << 21  # elements of a weight that are converted at a time: 24 MB in float32
MAX_ROWS = 4096  # most rows of x that are multiplied at a time, and most rows of a block of a weight
MIN_ROWS = 64  # with fewer rows in x, converting the weight costs more time than it saves
MIN_GAIN = 1.2  # conversion pays if the half-precision product takes at least this many times as long as float32's

# Reads a matrix in blocks of rows. Arguments: the most elements of a block (None: the whole matrix is one block), and
# the dtype of the blocks. Yields for each block the slice of its rows and the block itself. A block is valid until the
# next one is read.
BlockReader = Callable[[int | None, torch.dtype], Iterator[tuple[slice, Tensor]]]


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which products of `x` are computed: its own, or float32 where float32 is faster."""
    converts = x.dtype in HALF_DTYPES and x.device.type == "cpu" and is_slower_than_float32(x.dtype)
    return torch.float32 if converts else x.dtype


def takes_few(x: Tensor, weight: Tensor) -> bool:
    """Whether the product of `x`, shape (rows, in), is that of a few rows (`kernels.few_rows`), which has no graph."""
    return few_rows.takes(x, weight, few_rows.most_where_fast(x.shape[1]) if is_fast_half(x) else few_rows.MOST)


def is_fast_half(x: Tensor) -> bool:
    """Whether `x` is in half precision, and its products, too."""
    return x.dtype in HALF_DTYPES and product_dtype(x) is x.dtype


def goes_through_float32(x: Tensor) -> bool:
    """Whether the product of `x`, shape (rows, in), with a half-precision weight is computed in float32."""
    return len(x) >= MIN_ROWS and product_dtype(x) is not x.dtype


@functools.lru_cache
def is_slower_than_float32(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies `dtype` more slowly than float32. Each process measures it once, in some 50 ms."""
    return _seconds(dtype) > MIN_GAIN * _seconds(torch.float32)


def _seconds(dtype: torch.dtype) -> float:
    """The shortest time, in seconds, of a product of shapes 512 × 1024 and 1024 × 1024."""
    left, right = torch.ones(512, 1024, dtype=dtype), torch.ones(1024, 1024, dtype=dtype)
    taken = []
    for _ in range(4):  # the first product also sets up the library, so it is not counted
        start = time.perf_counter()
        torch.mm(left, right)
        taken.append(time.perf_counter() - start)
    return min(taken[1:])


class _Scratch(threading.local):
    """Scratch memory that each thread keeps and uses again. New memory pages take longer than the conversion."""

    def __init__(self) -> None:
        self.held: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}

    def __call__(self, use: str, rows: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """An uninitialised tensor, shape (rows, width). On a CPU it is valid until the next call for the same use.

        Args:
            use: a name for what the memory holds. Each use has memory of its own.
        """
        if device.type != "cpu":  # the GPU's allocator keeps freed memory itself
            return torch.empty(rows, width, dtype=dtype, device=device)
        key, size = (use, dtype, device), rows * width
        if key not in self.held or len(self.held[key]) < size:
            # A tensor made in inference mode can't be written outside of it.
            with torch.inference_mode(False):
                self.held[key] = torch.empty(size, dtype=dtype, device=device)
        return self.held[key][:size].view(rows, width)


scratch = _Scratch()  # called as scratch("sum", rows, width, dtype, device)


def read_blocks(weight: Tensor, max_elements: int | None, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """The blocks of a tensor, shape (rows, width), as a `BlockReader` yields them."""
    for rows in row_slices(weight.shape[0], weight.shape[1], max_elements):
        yield rows, converted(weight[rows], dtype, "weight")


def whole(weight: Tensor | BlockReader, dtype: torch.dtype) -> Tensor:
    """A weight as one tensor, shape (out, in). That of a reader is expanded for this call alone."""
    if isinstance(weight, Tensor):
        return weight
    ((_, block),) = weight(None, dtype)
    return block


def row_slices(rows: int, width: int, max_elements: int | None) -> Iterator[slice]:
    """Slices that cover `rows` rows in order.

    Each slice has at most `max_elements` elements and at most `MAX_ROWS` rows, but at least one row. If `max_elements`
    is None, one slice covers all rows.
    """
    step = rows if max_elements is None else max(1, min(MAX_ROWS, max_elements // width))
    for start in range(0, rows, step or 1):
        yield slice(start, min(start + step, rows))


def rows_at_once(x: Tensor) -> Iterator[slice]:
    """Slices of the rows of `x` that are multiplied at a time. A GPU multiplies all rows at once."""
    return row_slices(len(x), 1, MAX_ROWS if x.device.type == "cpu" else None)


def block_elements(x: Tensor) -> int | None:
    """How many elements of a weight are read at a time for a product with `x`. None: the whole weight."""
    return BLOCK_ELEMENTS if x.device.type == "cpu" else None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x Wᵀ + b`. The weight is frozen: only x and b get a gradient where the product goes through float32.

    Args:
        x: shape (..., in).
        weight: shape (out, in). If it requires a gradient, torch's own product is taken.
        bias: shape (out) or None.

    Returns:
        shape (..., out), in x's dtype.
    """
    if torch.is_autocast_enabled(x.device.type):
        kind = torch.get_autocast_dtype(x.device.type)
        x, weight, bias = x.to(kind), weight.to(kind), None if bias is None else bias.to(kind)
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    if takes_few(rows, weight):
        made = few_rows.few_rows(rows, weight)
        return (made if bias is None else made.add_(bias)).view(*x.shape[:-1], len(weight))
    trains = weight.requires_grad and torch.is_grad_enabled()
    if trains or weight.dtype != x.dtype or not goes_through_float32(rows):
        return torch.nn.functional.linear(x, weight, bias)
    return linear_by_blocks(x, functools.partial(read_blocks, weight), weight.shape[0], bias)


def linear_by_blocks(x: Tensor, weight: BlockReader, out: int, bias: Tensor | None = None) -> Tensor:
    """`linear` with a weight of `out` rows that is read block by block, in the forward and again in the backward."""
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    made: Tensor = _LinearByBlocks.apply(rows, weight, out, bias)  # type: ignore[no-untyped-call]
    return made if x.dim() == 2 else made.view(*x.shape[:-1], out)


class _LinearByBlocks(torch.autograd.Function):
    """x of shape (rows, in) to (rows, out). Keeps no tensor for the backward, only the reader of the weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: BlockReader, out: int, bias: Tensor | None) -> Tensor:
        ctx.weight, ctx.width = weight, x.shape[1]
        return forward_by_blocks(x, weight, out, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        dx = backward_by_blocks(grad, ctx.weight, ctx.width)
        return dx, None, None, grad.sum(0) if ctx.needs_input_grad[3] else None


def forward_by_blocks(x: Tensor, weight: BlockReader, out: int, bias: Tensor | None) -> Tensor:
    """`x Wᵀ + b` for x of shape (rows, in), without a graph."""
    made, dtype = x.new_empty(len(x), out), product_dtype(x)
    for chunk in rows_at_once(x):
        left = converted(x[chunk], dtype, "left")
        for rows, block in weight(block_elements(x), dtype):
            round_into(product(left, block.t(), made[chunk, rows]), made[chunk, rows])
    return made if bias is None else made.add_(bias)


def backward_by_blocks(grad: Tensor, weight: BlockReader, width: int) -> Tensor:
    """The gradient of x, shape (rows, width)."""
    dx, dtype = grad.new_empty(len(grad), width), product_dtype(grad)
    for chunk in rows_at_once(grad):
        total = accumulator(dx[chunk], dtype)
        for rows, block in weight(block_elements(grad), dtype):
            total.addmm_(converted(grad[chunk, rows], dtype, "gradient"), block)
        round_into(total, dx[chunk])
    return dx


def converted(x: Tensor, dtype: torch.dtype, use: str) -> Tensor:
    """`x`, shape (rows, width), in another dtype.

    The result lies in the scratch memory of `use`. If `x` has that dtype already, the result is `x` itself.
    """
    if x.dtype == dtype:
        return x
    return scratch(use, len(x), x.shape[1], dtype, x.device).copy_(x)


def product(left: Tensor, right: Tensor, into: Tensor) -> Tensor:
    """`left right`, written to `into` if that has the factors' dtype, else to scratch memory.

    `round_into` then brings the result from scratch memory to `into`.
    """
    if into.dtype != left.dtype:
        into = scratch("product", left.shape[0], right.shape[1], left.dtype, left.device)
    return torch.mm(left, right, out=into)


def uncast(left: Tensor, right: Tensor) -> Tensor:
    """`left right` in the factors' own dtype, under autocast too: it leaves products with `out` alone."""
    return torch.mm(left, right, out=left.new_empty(len(left), right.shape[1]))


def accumulator(into: Tensor, dtype: torch.dtype) -> Tensor:
    """Zeros of `dtype` in which a sum for `into`, shape (rows, width), is added up.

    They lie in `into` itself if it has that dtype, else in scratch memory. `round_into` then brings the sum to `into`.
    """
    if into.dtype != dtype:
        into = scratch("sum", len(into), into.shape[1], dtype, into.device)
    return into.zero_()


def round_into(made: Tensor, into: Tensor) -> None:
    """Copy a result from scratch memory to `into`, rounded to its dtype. Does nothing if it lies there already."""
    if made.data_ptr() != into.data_ptr():
        into.copy_(made)
