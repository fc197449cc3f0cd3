"""The processes that train jobs on this machine: started, found again by another server, stopped."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from phinetune.liveness import is_alive, process_record
from phinetune.serving.child_processes import called_with, kill, spawn
from phinetune.serving.job_places import JobPlaces
from phinetune.serving.job_queue import what_lacks, why_wait
from phinetune.serving.job_runner import Ended, Record
from phinetune.serving.settings import ServerSettings
from phinetune.serving.store import Row

TOLD = 4000  # letters of a job's log that are read for what went wrong


class JobsHere:
    """Trains jobs on this machine, as many at a time as its processors and its memory allow.

    A record, as `start` returns it, is that of a process (`phinetune.liveness`).
    """

    def __init__(self, settings: ServerSettings) -> None:
        self._settings = settings
        self._children: dict[int, subprocess.Popen[bytes]] = {}

    def start(self, job: Row, places: JobPlaces, environment: Mapping[str, str]) -> Record:
        """Train a job, or go on with it. The process outlives the server."""
        arguments = train_arguments(places)
        child = spawn("phinetune", arguments, places.log, places.config.parent, environment)
        self._children[child.pid] = child
        return process_record(child.pid)

    def find(self, configs: Iterable[Path]) -> Mapping[Path, Record]:
        """The processes that train with some of these configurations, whoever started them."""
        return called_with(configs, "train")

    def ended(self, process: Record) -> Ended | None:
        """How a process ended; None if it still runs."""
        child = self._children.get(int(process["pid"]))
        if (child is None or child.poll() is None) and is_alive(process):
            return None
        return Ended(self._children.pop(child.pid).wait() if child else None)

    def waits(self, process: Record) -> str | None:
        """What a job that was started waits for: nothing."""
        return None

    def ask_to_stop(self, process: Record) -> None:
        """Let a run finish its step, save and stop. One that does not train yet ends at once."""
        if is_alive(process):
            with suppress(ProcessLookupError):
                os.kill(int(process["pid"]), signal.SIGTERM)

    def kill(self, process: Record) -> None:
        """End a run at once."""
        kill(process)

    def why_wait(self, job: Row, others: Sequence[Row]) -> str | None:
        """What a queued job waits for; None if it can start."""
        return why_wait(job, others, self._settings)

    def what_lacks(self, plan: Mapping[str, Any]) -> tuple[str, str] | None:
        """What this machine will never have for a job, as an error's code and message; None if it has all."""
        return what_lacks(plan)


def train_arguments(places: JobPlaces) -> list[str]:
    """What `phinetune` is called with to train a job, or to go on with it."""
    return ["train", str(places.config), *(["--resume"] if places.run.is_run else [])]


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
