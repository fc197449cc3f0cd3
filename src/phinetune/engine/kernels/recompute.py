"""Keep a recipe for the backward in place of a tensor that is cheap to compute again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


@contextmanager
def rebuilt(tensor: Tensor, recipe: Callable[[], Tensor]) -> Iterator[None]:
    """Whatever inside the block saves `tensor` for its backward keeps `recipe` instead, and calls it then.

    Not for use under `torch.utils.checkpoint`: of nested hooks only the innermost see what is saved.

    Args:
        recipe: gives the tensor's value again, without a graph; must not hold `tensor` itself.
    """
    place = (tensor.data_ptr(), tensor.shape, tensor.stride())

    def pack(saved: Tensor) -> Any:
        same = (saved.data_ptr(), saved.shape, saved.stride()) == place
        return recipe if same else saved

    def unpack(kept: Any) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        with torch.no_grad():
            value: Tensor = kept()
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield
