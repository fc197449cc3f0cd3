"""Lets worker processes end with the process that started them, however that one ends.

A process that is killed can't end its workers, and they would wait for work for ever.
"""

from __future__ import annotations

import ctypes
import functools
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

PR_SET_PDEATHSIG = 1  # Linux: which signal the kernel sends to a process when its parent ends
LOOKS = 1.0  # seconds between two looks at the parent, where the kernel sends nothing

_starts_workers_of: list[int] = []  # the process that starts workers now, if any; a forked process has a copy


@contextmanager
def ending_with_us() -> Iterator[None]:
    """A context: each process that is forked in it ends when this one ends."""
    _follow_forks()
    _starts_workers_of.append(os.getpid())
    try:
        yield
    finally:
        _starts_workers_of.clear()


@functools.cache
def _follow_forks() -> None:
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_follow_starter)


def _follow_starter() -> None:
    if _starts_workers_of:
        end_with(_starts_workers_of.pop())  # what this process starts is not its parent's


@functools.cache
def end_with(parent: int) -> None:
    """Let this process end when its parent does. A second call changes nothing.

    Args:
        parent: its number. If the parent has ended already, this process ends at once.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    else:
        threading.Thread(target=_watch, args=(parent,), daemon=True).start()
    if os.getppid() != parent:
        os._exit(1)


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(LOOKS)
    os._exit(1)
