"""The processes that a launcher (`accelerate launch`, `torchrun`) started for one run.

The first process is the main one: it prints, writes and evaluates. Without a launcher there is one process; it is the
main one. All processes must call every function here, in the same order.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from torch import distributed

PATIENCE = timedelta(days=7)  # how long the other processes wait for work that the main process does alone


def join(*, cpu: bool, timeout_s: float) -> None:
    """Connect with the other processes, if a launcher started any. Each process gets a device of its own.

    Args:
        cpu: whether they run on the CPU.
        timeout_s: how many seconds processes wait for each other in a step.
    """
    from accelerate import PartialState

    PartialState(cpu=cpu, timeout=timedelta(seconds=timeout_s))


def count() -> int:
    """How many processes the run has."""
    return distributed.get_world_size() if _several() else 1


def rank() -> int:
    """Which of the run's processes this is, from 0."""
    return distributed.get_rank() if _several() else 0


def is_main() -> bool:
    """Whether this is the process that prints and writes."""
    return not _several() or distributed.get_rank() == 0


def own_device() -> torch.device | None:
    """The device that the launcher gave this process; None if this is the only process."""
    from accelerate import PartialState

    device: torch.device | None = PartialState().device if _several() else None
    return device


@contextmanager
def main_first() -> Iterator[None]:
    """A context. On each machine the block runs in the first process, then in the others, which find what it made."""
    if not _several():
        yield
        return
    from accelerate import PartialState

    with PartialState().local_main_process_first():
        yield


def any_of(flag: bool) -> bool:
    """Whether the flag is true in any process."""
    if not _several():
        return flag
    maximum = torch.tensor(int(flag), device=own_device())
    distributed.all_reduce(maximum, distributed.ReduceOp.MAX)
    return bool(maximum)


def summed(numbers: torch.Tensor) -> torch.Tensor:
    """The sum over all processes, on the CPU, in every process. The processes wait for each other for up to a week.

    Args:
        numbers: of the same shape in every process.
    """
    if not _several():
        return numbers
    group = distributed.new_group(backend="gloo", timeout=PATIENCE)
    total = numbers.clone()
    distributed.all_reduce(total, distributed.ReduceOp.SUM, group)
    return total


def mean(number: torch.Tensor) -> torch.Tensor:
    """The mean of a number over all processes, in every process, each with it on its own device."""
    if not _several():
        return number
    total = number.clone()
    distributed.all_reduce(total)
    return total / count()


def from_main(value: dict[str, Any]) -> dict[str, Any]:
    """The main process's value, in every process. The others wait until the main process has it, for up to a week.

    Args:
        value: a dictionary that JSON can hold. Only the main process's counts.
    """
    if not _several():
        return value
    group = distributed.new_group(backend="gloo", timeout=PATIENCE)
    sent = bytearray(json.dumps(value).encode()) if is_main() else bytearray()
    size = torch.tensor(len(sent))
    distributed.broadcast(size, 0, group)
    text = torch.frombuffer(sent or bytearray(int(size)), dtype=torch.uint8)
    distributed.broadcast(text, 0, group)
    received: dict[str, Any] = json.loads(bytes(text.tolist()))
    return received


def _several() -> bool:
    """Whether the run has more than one process."""
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
