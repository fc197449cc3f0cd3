"""Holds what a run will take against the limits that no program gets past, before its weights are loaded."""

from __future__ import annotations

from phinetune import processes
from phinetune.engine.device_memory import limits
from phinetune.errors import RunError
from phinetune.planning.setup import Setup
from phinetune.training.library_errors import LESS_MEMORY
from phinetune.training.prepare import PreparedRun


def check_limits(prepared: PreparedRun) -> None:
    """Make sure that a run on a CPU fits below the container's limit and the shell's.

    Raises:
        RunError: it does not fit.
    """
    found = limits() if prepared.device.type == "cpu" else []
    if not found:
        return
    need = Setup.of(prepared).need().memory.total
    needs = [need * processes.count() if limit.shared else need for limit in found]
    problems = [
        f"the run takes about {needed / 1e6:,.0f} MB, and {limit.name} leaves {max(0, limit.left) / 1e6:,.0f} MB "
        f"for it; raise that limit, or {LESS_MEMORY}"
        for limit, needed in zip(found, needs, strict=True)
        if needed > limit.left
    ]
    if problems:
        raise RunError(problems)
