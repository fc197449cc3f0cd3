"""Weights in q8_0: eight bits for each number, and a scale for each 32 of a row. Half of what bfloat16 takes.

The numbers are those of llama.cpp's q8_0: a block's scale is its largest magnitude / 127, kept in float16, and each
number is the nearest of 255 multiples of the scale. Products are those of the numbers that the weight then stands for,
in x's dtype. A step of answers is little else than reading weights: with one row of x a product takes some 0.6 of the
time that it takes in bfloat16.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from phinetune.engine.kernels.few_rows import MOST
from phinetune.engine.kernels.matmul import is_fast_half, row_slices, scratch
from phinetune.engine.kernels.native.operator import Operator, drawn, rows_of

BLOCK = 32  # numbers that share a scale
LARGEST = 127
MOST_WHERE_FAST = 16  # rows; with more it takes less to expand the weight, where the processor has half's products


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A weight in q8_0.

    Args:
        weight: shape (out, in). A last block of a row may be shorter.

    Returns:
        the numbers, shape (out, in) in int8, and the scales, shape (out, blocks of a row) in float16.
    """
    rows, width = weight.shape
    made = torch.empty(rows, width, dtype=torch.int8)
    scales = torch.empty(rows, -(-width // BLOCK), dtype=torch.float16)
    for part in row_slices(rows, width, 1 << 22):
        blocks = _in_blocks(weight[part].float())
        scale = blocks.abs().amax(-1, keepdim=True) / LARGEST
        steps = blocks * torch.where(scale > 0, 1 / scale, 0)
        nearest = (steps.abs() + 0.5).floor() * steps.sign()  # halves away from zero, as llama.cpp rounds them
        made[part] = nearest.flatten(1)[:, :width].to(torch.int8)
        scales[part] = scale[..., 0].half()
    return made, scales


def is_native(dtype: torch.dtype) -> bool:
    """Whether few rows in `dtype` are multiplied with weights as they lie here."""
    return _few_rows_of_q8.is_native(torch.empty(0, dtype=dtype))


def takes_few(x: Tensor) -> bool:
    """Whether the product of `x`, shape (rows, in), is made without expanding the weight. It has no graph."""
    most = MOST_WHERE_FAST if is_fast_half(x) else MOST
    has_graph = torch.is_grad_enabled() and x.requires_grad
    return 0 < len(x) <= most and not has_graph and _few_rows_of_q8.is_native(x)


def few_rows(x: Tensor, weight: Tensor, scales: Tensor) -> Tensor:
    """`x Wᵀ`, shape (rows, out), for x of shape (rows, in) and what `quantize` returned."""
    out = x.new_empty(len(x), len(weight))
    _few_rows_of_q8(rows_of(x), weight, scales, out)
    return out


def read_blocks(
    weight: Tensor, scales: Tensor, max_elements: int | None, dtype: torch.dtype
) -> Iterator[tuple[slice, Tensor]]:
    """The rows of a weight in q8_0 as numbers of `dtype`, as a `matmul.BlockReader` yields them."""
    for rows in row_slices(len(weight), weight.shape[1], max_elements):
        held = weight[rows]
        block = scratch("weight", len(held), held.shape[1], dtype, held.device)
        _expand_q8(block, held, scales[rows])
        yield rows, block


def expanded(weight: Tensor, scales: Tensor) -> Tensor:
    """The numbers that a weight in q8_0 stands for, shape (out, in), in float32."""
    blocks = _in_blocks(weight.float()) * scales.float()[..., None]
    return blocks.flatten(1)[:, : weight.shape[1]]


def _in_blocks(x: Tensor) -> Tensor:
    """Shape (rows, width) as (rows, blocks, BLOCK), the last block filled up with zeros."""
    return F.pad(x, (0, -x.shape[1] % BLOCK)).view(len(x), -1, BLOCK)


def _few_by_torch(x: Tensor, weight: Tensor, scales: Tensor, out: Tensor) -> None:
    out.copy_(x.float() @ expanded(weight, scales).t())


def _expand_by_torch(out: Tensor, weight: Tensor, scales: Tensor) -> None:
    out.copy_(expanded(weight, scales))


def _sample_few(kind: torch.dtype) -> tuple[Tensor, ...]:
    x, weight = drawn((8, 2048), (2048, 2048), kind=kind)
    return x, *quantize(weight / 2048**0.5), x.new_empty(len(x), len(weight))


def _sample_expand(kind: torch.dtype) -> tuple[Tensor, ...]:
    (weight,) = drawn((2048, 2048), kind=kind)
    return torch.empty_like(weight), *quantize(weight)


_few_rows_of_q8 = Operator("few_rows_of_q8", _few_by_torch, _sample_few)
_expand_q8 = Operator("expand_q8", _expand_by_torch, _sample_expand)
