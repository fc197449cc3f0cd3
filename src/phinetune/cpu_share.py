"""How this program shares the processor: how its threads wait for each other, and how much other programs use."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import MutableMapping
from contextlib import suppress
from dataclasses import dataclass

# What a user may have set: these decide how OpenMP's threads wait.
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
# How often a thread of libgomp looks for work before it sleeps. libgomp's own 300,000 takes the processor from others
# for milliseconds; without any looks, a step on a quiet machine takes 30 to 45% longer (benchmarks/waiting.py).
SPINS = 10_000
IDLE = ("idle", "iowait", "guest", "guest_nice")  # the kernel counts a guest's time as user time, too


def share_processor(
    environment: MutableMapping[str, str] | None = None, *, torch_is_loaded: bool | None = None
) -> None:
    """Make OpenMP's threads sleep soon while they wait, so that a busy machine does not slow the run many times over.

    torch's OpenMP reads the environment when torch is loaded, so this comes before it. What the user set stays.

    Args:
        environment: the process's own, if left out.
        torch_is_loaded: whether it is too late; looked up if left out.
    """
    environment = os.environ if environment is None else environment
    late = "torch" in sys.modules if torch_is_loaded is None else torch_is_loaded
    if not late and not any(name in environment for name in WAITING):
        environment["GOMP_SPINCOUNT"] = str(SPINS)


@dataclass(frozen=True)
class Usage:
    """Processor time up to a moment, in seconds.

    Attributes:
        moment: of a clock that never goes back.
        machine: of all programs on all cores.
        own: of this process and its children.
    """

    moment: float
    machine: float
    own: float

    @classmethod
    def now(cls) -> Usage:
        import psutil

        times = psutil.cpu_times()._asdict()
        machine = sum(seconds for kind, seconds in times.items() if kind not in IDLE)
        return cls(time.monotonic(), machine, _own_seconds())

    def others_until(self, later: Usage) -> float:
        """How many cores other programs used between this moment and a later one, on average."""
        passed = later.moment - self.moment
        used = (later.machine - self.machine) - (later.own - self.own)
        return max(0.0, used / passed) if passed > 0 else 0.0


def _own_seconds() -> float:
    import psutil

    process = psutil.Process()
    own = process.cpu_times()
    total = own.user + own.system + own.children_user + own.children_system
    for child in process.children(recursive=True):
        with suppress(psutil.Error):  # it has just ended
            total += sum(child.cpu_times()[:2])
    return float(total)


@dataclass(frozen=True)
class Company:
    """Other programs on the machine.

    Attributes:
        used: how many cores they use.
        cores: how many the machine has.
        threads: how many of them this program computes with.
    """

    used: float
    cores: int
    threads: int

    @classmethod
    def between(cls, before: Usage, after: Usage) -> Company:
        """The other programs between two moments."""
        import torch

        return cls(before.others_until(after), os.cpu_count() or 1, torch.get_num_threads())

    @property
    def disturbs(self) -> bool:
        """Whether so few cores are left that this program has to wait for one: at least half a core is missing."""
        return self.used + self.threads >= self.cores + 0.5

    def describe(self) -> str:
        return f"other programs use {self.used:.1f} of {self.cores} cores"
