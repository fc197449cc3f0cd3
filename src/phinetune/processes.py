"""The processes that a launcher (`accelerate launch`, `torchrun`) started for one run.

The first of them is the main one: it prints, writes and evaluates. A process that nothing launched is the main one
of one. Every function here must be called by all processes, in the same order.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from torch import distributed

PATIENCE = timedelta(days=7)  # for what the main process does alone


def join(*, cpu: bool, timeout_s: float) -> None:
    """Meet the other processes, if a launcher started any; each takes a device of its own.

    Args:
        cpu: they run on the CPU.
        timeout_s: how long processes wait for one another in a step.
    """
    from accelerate import PartialState

    PartialState(cpu=cpu, timeout=timedelta(seconds=timeout_s))


def count() -> int:
    """How many processes work on this run."""
    return distributed.get_world_size() if _several() else 1


def is_main() -> bool:
    """Whether this is the process that prints and writes."""
    return not _several() or distributed.get_rank() == 0


def own_device() -> torch.device | None:
    """The device that the launcher gave this process; None where it is the only one."""
    from accelerate import PartialState

    device: torch.device | None = PartialState().device if _several() else None
    return device


@contextmanager
def main_first() -> Iterator[None]:
    """The block runs in each machine's first process, then in the others: what it makes is made once."""
    if not _several():
        yield
        return
    from accelerate import PartialState

    with PartialState().local_main_process_first():
        yield


def any_of(flag: bool) -> bool:
    """Whether the flag is up in any process."""
    if not _several():
        return flag
    raised = torch.tensor(int(flag), device=own_device())
    distributed.all_reduce(raised, distributed.ReduceOp.MAX)
    return bool(raised)


def from_main(value: dict[str, Any]) -> dict[str, Any]:
    """The main process's dictionary, which JSON can hold, in every process; waits however long that one works."""
    if not _several():
        return value
    group = distributed.new_group(backend="gloo", timeout=PATIENCE)
    written = bytearray(json.dumps(value).encode()) if is_main() else bytearray()
    size = torch.tensor(len(written))
    distributed.broadcast(size, 0, group)
    text = torch.frombuffer(written or bytearray(int(size)), dtype=torch.uint8)
    distributed.broadcast(text, 0, group)
    read: dict[str, Any] = json.loads(bytes(text.tolist()))
    return read


def _several() -> bool:
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
