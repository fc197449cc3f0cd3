"""Memory of large tensors that is kept between the steps of a run on a CPU."""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from phinetune.engine.kernels.native.operator import has_library

_runs = 0  # that keep memory now
_lock = threading.Lock()


@contextmanager
def kept_memory(device: torch.device) -> Iterator[bool]:
    """While this lasts, new tensors of a megabyte or more come out of memory of their own, which is used again.

    C's heap returns large blocks to the system, and the next step waits for new pages; and it grows where steps differ
    in length. Tensors that are made meanwhile may last longer. At the end, what is free goes back to the system.

    Args:
        device: nothing changes on others than a CPU.

    Yields:
        whether memory is kept. It is not where there is no native library, on other systems than Linux, and under a
        limit of the address space.
    """
    keeps = keeps_memory(device)
    if keeps:
        _count(1)
    try:
        yield keeps
    finally:
        if keeps:
            _count(-1)


def keeps_memory(device: torch.device) -> bool:
    """Whether a run on this device keeps memory."""
    return device.type == "cpu" and has_library() and _count(0)


def trim_heap() -> None:
    """Give what is free in C's heap back to the system, where the C library can: glibc's."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def _count(more: int) -> bool:
    """Count runs that begin or end. Returns whether there is memory to keep."""
    global _runs
    with _lock:
        _runs += more
        keeps: bool = torch.ops.phinetune.keep_memory(_runs > 0)
        return keeps
