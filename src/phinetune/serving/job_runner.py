"""What trains the jobs of a server: this machine, or a Ray cluster."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from phinetune.serving.job_places import JobPlaces
from phinetune.serving.store import Row

STOPPED = 75  # the exit status of a run that stopped with a checkpoint; see `phinetune.cli.train`
USERS_MISTAKE = 2
Record = Mapping[str, Any]  # of a started job: JSON, by which another server finds it again


@dataclass(frozen=True)
class Ended:
    """That what trained a job is gone, with its exit status where it is known."""

    status: int | None


class JobRunner(Protocol):
    """Starts jobs and knows what became of them."""

    def start(self, job: Row, places: JobPlaces, environment: Mapping[str, str]) -> Record:
        """Train a job, or go on with it, whatever becomes of this server.

        Raises:
            PhinetuneError: it can't be started now.
        """

    def find(self, configs: Iterable[Path]) -> Mapping[Path, Record]:
        """What trains with some of these configurations, whoever started it."""

    def ended(self, process: Record) -> Ended | None:
        """How it ended; None if it still trains, or waits to."""

    def waits(self, process: Record) -> str | None:
        """What a job that was started still waits for."""

    def ask_to_stop(self, process: Record) -> None:
        """Let it finish its step, save and stop."""

    def kill(self, process: Record) -> None:
        """End it at once."""

    def why_wait(self, job: Row, others: Sequence[Row]) -> str | None:
        """What a queued job waits for beside others that were started; None if it can start."""

    def what_lacks(self, plan: Mapping[str, Any]) -> tuple[str, str] | None:
        """What there will never be for a job, as an error's code and message; None if there is all."""
