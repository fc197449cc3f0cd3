"""A linear layer whose weight lies in q8_0: for answers, where half the memory and half the time to read it are wanted.

The numbers change by the rounding to eight bits, as they do in a GGUF file of that type. Nothing is trained on them.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from phinetune.engine.half_linear import HalfLinear, replace_linears
from phinetune.engine.kernels import q8
from phinetune.engine.kernels.matmul import linear_by_blocks


class Q8Linear(nn.Linear):
    """`x Wᵀ + b` for W in q8_0 (`kernels.q8`). x gets its gradient.

    Attributes:
        weight: the numbers, shape (out, in) in int8.
        scales: shape (out, blocks of a row) in float16.
    """

    scales: Tensor

    def __init__(self, like: nn.Linear) -> None:
        """Round the weight of a layer, and take over its bias."""
        super().__init__(like.in_features, like.out_features, bias=like.bias is not None, device="meta")
        numbers, scales = q8.quantize(like.weight.detach())
        self.weight = nn.Parameter(numbers, requires_grad=False)
        self.register_buffer("scales", scales, persistent=False)
        if like.bias is not None:
            self.bias = nn.Parameter(like.bias.detach().clone(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        if not q8.takes_few(rows):
            reader = functools.partial(q8.read_blocks, self.weight, self.scales)
            return linear_by_blocks(x, reader, self.out_features, self.bias)
        made = q8.few_rows(rows, self.weight, self.scales)
        return (made if self.bias is None else made.add_(self.bias)).view(*x.shape[:-1], self.out_features)


ANSWERING = (HalfLinear, Q8Linear)  # the layers of a model that only answers


@torch.no_grad()
def lie_in_q8(model: Any, dtype: torch.dtype) -> None:
    """Let the weights of a model's linear layers lie in q8_0, and all others in `dtype`.

    A head that is tied to the embedding gets a weight of its own; of the embedding each step of an answer reads a few
    rows.
    """
    replace_linears(model, Q8Linear)
    for parameter in model.parameters():
        if parameter.is_floating_point():  # copied: what is read in its own dtype keeps the whole file in memory
            parameter.data = parameter.data.to(dtype, copy=True)
