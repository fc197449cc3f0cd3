"""Compute a cheap tensor again in the backward, so that it need not be kept for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


@contextmanager
def recomputed(tensor: Tensor, compute: Callable[[], Tensor]) -> Iterator[None]:
    """Operators inside this block that would save `tensor` for their backward save `compute`, and call it then.

    Do not use it under `torch.utils.checkpoint`. Both work by hooks on saved tensors, and of nested hooks torch calls
    only the innermost.

    Args:
        compute: gives the tensor's value again. It is called without a graph, and must not hold `tensor` itself.
    """
    place = (tensor.data_ptr(), tensor.shape, tensor.stride())

    def pack(saved: Tensor) -> Any:
        same = (saved.data_ptr(), saved.shape, saved.stride()) == place
        return compute if same else saved

    def unpack(kept: Any) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        with torch.no_grad():
            value: Tensor = kept()
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield
