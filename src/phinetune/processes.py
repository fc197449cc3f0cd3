"""The processes that a launcher (`accelerate launch`, `torchrun`) started for one run.

The first process is the main one: it prints, writes and evaluates. Without a launcher there is one process; it is the
main one. All processes must call every function here, in the same order.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import distributed

Item = TypeVar("Item")
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
    total = numbers.clone()
    distributed.all_reduce(total, distributed.ReduceOp.SUM, _patient())
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
    return _sent_by(0, value) if _several() else value


def gathered(value: Any) -> list[Any]:
    """Each process's value, in the order of the ranks, in every process. They wait for each other for up to a week.

    Args:
        value: what JSON can hold.
    """
    return [_sent_by(sender, value) for sender in range(count())] if _several() else [value]


def shared_out(items: Sequence[Item], work: Callable[[list[Item]], list[Any]]) -> list[Any]:
    """What `work` makes of each item, in the order of the items, in every process. Each process works on a part.

    Args:
        items: the same in every process, those that cost alike side by side.
        work: gives one result an item, as JSON holds it.
    """
    own = work(list(items[rank() :: count()]))
    made: list[Any] = [None] * len(items)
    for number, part in enumerate(gathered(own)):
        made[number :: count()] = part
    return made


def _sent_by(sender: int, value: Any) -> Any:
    """The value of one process, in every process."""
    sent = bytearray(json.dumps(value).encode()) if rank() == sender else bytearray()
    size = torch.tensor(len(sent))
    distributed.broadcast(size, sender, _patient())
    text = torch.frombuffer(sent or bytearray(int(size)), dtype=torch.uint8)
    distributed.broadcast(text, sender, _patient())
    return json.loads(bytes(text.tolist()))


@functools.cache
def _patient() -> Any:
    """The processes as a group that waits for up to a week, on the CPU."""
    return distributed.new_group(backend="gloo", timeout=PATIENCE)


def _several() -> bool:
    """Whether the run has more than one process."""
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
