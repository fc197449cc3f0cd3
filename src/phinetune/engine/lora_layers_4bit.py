"""PEFT's LoRA layer over a 4-bit base on `phinetune.lora`'s one function. Imports bitsandbytes."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from bitsandbytes.functional import QuantState, dequantize_4bit, dequantize_blockwise
from bitsandbytes.nn.modules import Linear4bit as Linear4bitBase
from peft.tuners.lora.bnb import Linear4bit
from torch import Tensor

from phinetune.engine.kernels.matmul import cut, expanded, widened
from phinetune.engine.lora_layers import base_alone, dropped, only_adapter
from phinetune.lora.functional import lora_linear


class FusedLinear4bit(Linear4bit):
    """The weight is expanded for the product, dropped, and expanded again for the backward.

    bitsandbytes' own forward is not called: on a CPU with AVX512-BF16 it repacks the weight for good, with coarser
    scales, as soon as nothing trains.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        base: Any = self.base_layer
        if args or kwargs:
            return super().forward(x, *args, **kwargs)
        weight = functools.partial(_expand, base.weight.data, base.weight.quant_state, x.dtype)
        if base_alone(self, Linear4bitBase):
            return expanded(x, weight, base.out_features, base.bias)
        name = only_adapter(self, Linear4bitBase)
        if name is None:
            return super().forward(x)
        a: Any = self.lora_A[name].weight
        b: Any = self.lora_B[name].weight
        return lora_linear(x, weight, base.bias, a, b, self.scaling[name], dropped(self, name, x))


def _expand(
    data: Tensor, state: Any, kind: torch.dtype, most: int | None, dtype: torch.dtype
) -> Iterator[tuple[slice, Tensor]]:
    """The `Blocks` (kernels.matmul) of a 4-bit weight: rounded to `kind`, as a product of that dtype has it."""
    rows, width = state.shape
    if width % state.blocksize:  # a row would begin inside a scale's block
        most = None
    scales = dequantize_blockwise(state.absmax, state.state2) + state.offset if state.nested else state.absmax
    packed, scales = data.view(torch.uint8).view(-1), scales.float()
    for part in cut(rows, width, most):
        first, last = part.start * width, part.stop * width
        held = QuantState(  # type: ignore[no-untyped-call]
            scales[first // state.blocksize : -(-last // state.blocksize)],
            torch.Size((part.stop - part.start, width)),
            blocksize=state.blocksize,
            quant_type=state.quant_type,
            dtype=state.dtype,
        )
        yield part, widened(dequantize_4bit(packed[first // 2 : -(-last // 2), None], held).to(kind), dtype, "weight")
