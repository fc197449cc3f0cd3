"""Says whether a job can start now, and if not, what it waits for."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import psutil

from phinetune.serving.settings import ServerSettings
from phinetune.serving.store import Row

PROGRAM = 1_000_000_000  # bytes that the libraries take, which a plan does not count


def jobs_at_once(settings: ServerSettings) -> int:
    """How many jobs train at the same time: as many as asked for, else one for each two cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    return settings.at_once or max(1, cores // 2)


def what_lacks(plan: Mapping[str, Any]) -> tuple[str, str] | None:
    """What this machine will never have for a job, as an error's code and message; None if it has all.

    Args:
        plan: as `phinetune.serving.work.plan_job` returned it.
    """
    lacking = what_disk_lacks(plan)
    if lacking:
        return lacking
    total = psutil.virtual_memory().total
    if plan["on_cpu"] and plan["memory"] + PROGRAM > total:
        need = (plan["memory"] + PROGRAM) / 1e9
        return "insufficient_memory", f"it needs {need:.1f} GB of memory, and this machine has {total / 1e9:.1f} GB"
    return None


def what_disk_lacks(plan: Mapping[str, Any]) -> tuple[str, str] | None:
    """The same for the disk alone."""
    if plan["disk"] <= plan["free_disk"]:
        return None
    needs = f"its checkpoints take {plan['disk'] / 1e9:.1f} GB, and {plan['free_disk'] / 1e9:.1f} GB are free"
    return "insufficient_disk", needs


def why_wait(job: Row, others: Sequence[Row], settings: ServerSettings) -> str | None:
    """What a queued job waits for; None if it can start.

    Args:
        others: the jobs that have a process now.
    """
    if len(others) >= jobs_at_once(settings):
        return f"{_named(others)} trains, and this server trains {_number(jobs_at_once(settings))} at a time"
    if job["memory"] == 0 and others:
        return f"{_named(others)} trains on the device"
    need = job["memory"] + PROGRAM if job["memory"] else 0
    promised = sum(max(0, one["memory"] + PROGRAM - memory_of(json.loads(one["process"]))) for one in others)
    free = psutil.virtual_memory().available - promised
    if need <= free:
        return None
    return f"it needs {need / 1e9:.1f} GB of memory, and less is free"  # how much changes all the time


def memory_of(process: Mapping[str, Any]) -> int:
    """Bytes that a process has in memory; 0 if it is gone."""
    try:
        return int(psutil.Process(int(process["pid"])).memory_info().rss)
    except psutil.Error:
        return 0


def _named(jobs: Sequence[Row]) -> str:
    return ", ".join(job["id"] for job in jobs)


def _number(count: int) -> str:
    return "one job" if count == 1 else f"{count} jobs"
