"""A linear layer of float32 whose weight lies in bfloat16.

Every bfloat16 is a float32 with half of its bits zero, so a weight that was made in bfloat16 loses nothing by lying so,
and its products stay those of float32. It takes half the memory, and half the time to be read. A step of an answer is
little else than reading weights.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from phinetune.engine.kernels import few_rows
from phinetune.engine.kernels.matmul import linear_by_blocks, read_blocks


class HalfLinear(nn.Linear):
    """`x Wᵀ + b` for x and b in float32 and W in bfloat16, which is not trained. x gets its gradient."""

    def __init__(self, like: nn.Linear) -> None:
        """Take over the weight of a layer in bfloat16, and its bias.

        They are copied: weights that are read in their own dtype lie in the file, which may be written to meanwhile.
        """
        super().__init__(like.in_features, like.out_features, bias=like.bias is not None, device="meta")
        self.weight = nn.Parameter(like.weight.detach().clone(), requires_grad=False)
        if like.bias is not None:
            self.bias = nn.Parameter(like.bias.detach().float(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        with few_rows.in_step():
            if not few_rows.takes(rows, self.weight, few_rows.MOST):
                return linear_by_blocks(x, functools.partial(read_blocks, self.weight), self.out_features, self.bias)
        made = few_rows.few_rows(rows, self.weight)
        return (made if self.bias is None else made.add_(self.bias)).view(*x.shape[:-1], self.out_features)


def replace_linears(model: Any, kind: Callable[[nn.Linear], nn.Module]) -> None:
    """Put a layer of another kind in the place of each plain linear layer of a model."""
    # By their names: a list of the layers would keep all of their weights in memory to the end.
    for name in [name for name, module in model.named_modules() if type(module) is nn.Linear]:
        model.set_submodule(name, kind(model.get_submodule(name)))


@torch.no_grad()
def lie_in_half(model: Any) -> None:
    """Make float32 of a model in bfloat16, but for the weights of its linear layers, which stay as they are.

    A head that is tied to the embedding keeps a weight of its own: each step of an answer reads the whole head, and of
    the embedding a few rows.
    """
    replace_linears(model, HalfLinear)
    half = {id(module.weight) for module in model.modules() if isinstance(module, HalfLinear)}
    for parameter in model.parameters():
        if id(parameter) not in half:
            parameter.data = parameter.data.float()
