"""Calls an autograd function outside of a graph, so that several of them make one node.

A node costs some ten microseconds in each direction, whatever it computes. On a small step that is a good part of the
time. `phinetune.engine.layer_function` computes a whole layer as one node, out of the functions that are nodes else.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Kept:
    """What a call keeps for its backward; stands for the context that torch gives to an autograd function.

    Attributes:
        needs_input_grad: for each argument of the call, whether it needs a gradient.
        has_room: whether the gradient that comes has room behind its rows (`kernels.room`) for what the backward needs.
    """

    has_room = False

    def __init__(self, function: type[torch.autograd.Function], needs: tuple[bool, ...]) -> None:
        self.function, self.needs_input_grad = function, needs
        self.saved_tensors: tuple[Any, ...] = ()

    def save_for_backward(self, *tensors: Any) -> None:
        self.saved_tensors = tensors

    def drop(self, tensor: Tensor) -> None:
        """Do not keep `tensor`. Before the backward, `restore` gives it back."""
        self.saved_tensors = tuple(_DROPPED if saved is tensor else saved for saved in self.saved_tensors)

    def restore(self, tensor: Tensor) -> None:
        """Put `tensor` into the places of the one that was dropped."""
        self.saved_tensors = tuple(tensor if saved is _DROPPED else saved for saved in self.saved_tensors)

    def backward(self, grad: Tensor) -> tuple[Any, ...]:
        """The gradients of the arguments. What was kept is let go."""
        found: tuple[Any, ...] = self.function.backward(self, grad)
        self.saved_tensors = ()
        return found


_DROPPED = object()


def call(function: type[torch.autograd.Function], *args: Any, needs: tuple[int, ...]) -> tuple[Tensor, Kept]:
    """The result of `function.forward`, and what its backward needs. Gradients are off in the caller.

    Args:
        needs: the places of the arguments that need a gradient.
    """
    kept = Kept(function, tuple(i in needs for i in range(len(args))))
    out: Tensor = function.forward(kept, *args)
    return out, kept
