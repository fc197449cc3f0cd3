"""PEFT's LoRA layer over a 4-bit base, computed by one function of `phinetune.lora`. Imports bitsandbytes."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from bitsandbytes.functional import QuantState, dequantize_4bit, dequantize_blockwise
from bitsandbytes.nn.modules import Linear4bit as Linear4bitBase
from peft.tuners.lora.bnb import Linear4bit
from torch import Tensor

from phinetune.engine.kernels.matmul import BlockReader, converted, linear_by_blocks, row_slices
from phinetune.engine.lora_layers import adapted, base_alone, dropped, only_adapter
from phinetune.lora.functional import Projection, lora_linear


class FusedLinear4bit(Linear4bit):
    """PEFT's `Linear4bit`. The weight is expanded for the product, dropped, and expanded again for the backward.

    bitsandbytes' own forward is not called. On a CPU with AVX512-BF16 it would pack the weight in another order, with
    coarser scales, the first time that the layer runs outside training, and never change it back.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        base: Any = self.base_layer
        if args or kwargs:
            return super().forward(x, *args, **kwargs)
        weight = _reader(base, x.dtype)
        if base_alone(self, Linear4bitBase):
            return linear_by_blocks(x, weight, base.out_features, base.bias)
        name = only_adapter(self, Linear4bitBase)
        if name is None:
            return super().forward(x)
        a: Any = self.lora_A[name].weight
        b: Any = self.lora_B[name].weight
        return lora_linear(x, weight, base.bias, a, b, self.scaling[name], dropped(self, name, x))

    def projection(self, dtype: torch.dtype) -> Projection | None:
        """What the forward computes for a row of `dtype`, to be called outside of a graph; None if it can't be."""
        return adapted(self, Linear4bitBase, _reader(self.base_layer, dtype))


def _reader(base: Any, dtype: torch.dtype) -> BlockReader:
    """Reads the weight of a 4-bit layer for products of x in `dtype`."""
    # A weight that is spread over processes is a parameter of torch's own class, and its scales are the module's.
    state = getattr(base.weight, "quant_state", None) or base.quant_state
    return functools.partial(_expand, base.weight.data, state, dtype)


def _expand(
    data: Tensor, state: Any, rounded: torch.dtype, max_elements: int | None, dtype: torch.dtype
) -> Iterator[tuple[slice, Tensor]]:
    """Read a 4-bit weight block by block; with the first three arguments bound, a `BlockReader` (`kernels.matmul`).

    Args:
        data, state: the packed weight, and bitsandbytes' `QuantState` of it.
        rounded: the dtype that values are rounded to first. A product in this dtype would see the same values.
        max_elements, dtype: see `BlockReader`.
    """
    rows, width = state.shape
    # Some rows begin inside a block that shares a scale: then the weight is read whole, too.
    if max_elements is None or width % state.blocksize:
        expanded = dequantize_4bit(data.view(torch.uint8).view(-1, 1), state)
        yield slice(0, rows), converted(expanded.to(rounded), dtype, "weight")
        return
    scales = dequantize_blockwise(state.absmax, state.state2) + state.offset if state.nested else state.absmax
    packed, scales = data.view(torch.uint8).view(-1), scales.float()
    for part in row_slices(rows, width, max_elements):
        first, last = part.start * width, part.stop * width
        part_state = QuantState(  # type: ignore[no-untyped-call]
            scales[first // state.blocksize : -(-last // state.blocksize)],
            torch.Size((part.stop - part.start, width)),
            blocksize=state.blocksize,
            quant_type=state.quant_type,
            dtype=state.dtype,
        )
        codes = packed[first // 2 : -(-last // 2), None]
        yield part, converted(dequantize_4bit(codes, part_state).to(rounded), dtype, "weight")
