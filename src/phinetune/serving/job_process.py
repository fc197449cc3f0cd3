"""The process that trains a job: started, found again by another server, stopped."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from phinetune.liveness import is_alive
from phinetune.serving.child_processes import called_with, spawn
from phinetune.serving.job_places import JobPlaces

STOPPED = 75  # the exit status of a run that stopped with a checkpoint; see `phinetune.cli.train`
USERS_MISTAKE = 2
TOLD = 4000  # letters of a job's log that are read for what went wrong


def start(places: JobPlaces, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """Train a job, or go on with it. The process outlives the server."""
    resume = ["--resume"] if places.run.is_run else []
    return spawn("phinetune", ["train", str(places.config), *resume], places.log, places.config.parent, environment)


def running_jobs(configs: Iterable[Path]) -> dict[Path, dict[str, Any]]:
    """The processes that train with some of these configurations, whoever started them."""
    return called_with(configs, "train")


def ask_to_stop(process: Mapping[str, Any]) -> None:
    """Let a run finish its step, save and stop. One that does not train yet ends at once."""
    if is_alive(process):
        with suppress(ProcessLookupError):
            os.kill(int(process["pid"]), signal.SIGTERM)


def memory_of(process: Mapping[str, Any]) -> int:
    """Bytes that a process has in memory; 0 if it is gone."""
    try:
        return int(psutil.Process(int(process["pid"])).memory_info().rss)
    except psutil.Error:
        return 0


def last_errors(log: Path) -> list[str]:
    """What the last call said that was wrong, without its lead."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - TOLD))
            lines = file.read().decode("utf-8", "replace").splitlines()
    except OSError:
        return []
    told: list[str] = []
    for line in reversed(lines):
        if line.startswith("error: "):
            told.append(line.removeprefix("error: "))
        elif told:
            break
    return told[::-1]
