"""How the libraries are loaded: torch, transformers and PEFT make a million objects, and none of them is garbage."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def libraries(*, stay: bool = True) -> Iterator[None]:
    """Import large libraries in this block without Python's cycle collector, which would go through all that they have
    made again and again: a sixth of the time that they take.

    Args:
        stay: also leave everything that is there at the end out of later collections, once a process. For a program of
            our own; in a user's program, the user's objects are there, too.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if stay and not gc.get_freeze_count():
            gc.freeze()
        if was_enabled:
            gc.enable()
