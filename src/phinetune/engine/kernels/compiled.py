"""torch.compile for the element-wise kernels, on machines where torch finds a compiler."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeVar

import torch

F = TypeVar("F", bound=Callable[..., object])


@functools.lru_cache
def compiled(function: F) -> F:
    """`function`, compiled once for tensors of every size."""
    made: F = torch.compile(function, dynamic=True)  # type: ignore[assignment]
    return made


@functools.lru_cache
def why_not() -> str | None:
    """Why torch.compile does not work on this machine; None if it works. A small sum is compiled to find out."""
    try:
        compiled(torch.add)(torch.ones(2), torch.ones(2))
    except Exception as error:  # the compiler's errors have no common class
        return (str(error).strip().splitlines() or [type(error).__name__])[0]
    return None
