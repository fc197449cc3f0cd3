"""PEFT's LoRA layer over a 4-bit base on `phinetune.lora`'s one function. Imports bitsandbytes."""

from __future__ import annotations

import functools
from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn.modules import Linear4bit as Linear4bitBase
from peft.tuners.lora.bnb import Linear4bit
from torch import Tensor

from phinetune.lora.functional import lora_linear
from phinetune.model.fused import dropped, only_adapter


class FusedLinear4bit(Linear4bit):
    """The weight is expanded for the product, dropped, and expanded again for the backward."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        name = None if args or kwargs else only_adapter(self, Linear4bitBase)
        if name is None:
            return super().forward(x, *args, **kwargs)
        base: Any = self.base_layer
        expand = functools.partial(_expand, base.weight.data, base.weight.quant_state, x.dtype)
        a: Any = self.lora_A[name].weight
        b: Any = self.lora_B[name].weight
        return lora_linear(x, expand, base.bias, a, b, self.scaling[name], dropped(self, name, x))


@torch.no_grad()
def _expand(data: Tensor, state: Any, dtype: torch.dtype) -> Tensor:
    weight: Tensor = dequantize_4bit(data, state).to(dtype)
    return weight
