"""torch.compile for the element-wise operators, where there is a compiler."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeVar

import torch

F = TypeVar("F", bound=Callable[..., object])


@functools.lru_cache
def compiled(function: F) -> F:
    """`function`, compiled once for all sizes."""
    made: F = torch.compile(function, dynamic=True)  # type: ignore[assignment]
    return made


@functools.lru_cache
def why_not() -> str | None:
    """Why nothing can be compiled here, found by compiling a sum; None if it works."""
    try:
        compiled(torch.add)(torch.ones(2), torch.ones(2))
    except Exception as error:  # the compiler's errors share no class
        return (str(error).strip().splitlines() or [type(error).__name__])[0]
    return None
