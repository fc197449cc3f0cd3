"""Changes of jobs that are more than one column: new ones, events, ends."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from phinetune.serving.ids import new_id, now
from phinetune.serving.store import Row, Store

VALIDATING, QUEUED, RUNNING, PAUSED = "validating_files", "queued", "running", "paused"
SUCCEEDED, FAILED, CANCELLED = "succeeded", "failed", "cancelled"
ENDED = (SUCCEEDED, FAILED, CANCELLED)
OPEN = (VALIDATING, QUEUED, RUNNING, PAUSED)


def shown_status(job: Row) -> str:
    """The status as people see it: a job that was started and still waits for its place is queued."""
    return QUEUED if job["status"] == RUNNING and job["waits_for"] else str(job["status"])


class JobTable:
    """The jobs of a store."""

    def __init__(self, store: Store) -> None:
        self.store = store

    def get(self, job: str) -> Row | None:
        return self.store.row("SELECT * FROM jobs WHERE id = ?", [job])

    def in_states(self, *states: str) -> list[Row]:
        """The jobs in some states, oldest first."""
        marks = ", ".join("?" * len(states))
        return self.store.rows(f"SELECT * FROM jobs WHERE status IN ({marks}) ORDER BY seq", states)

    def with_process(self) -> list[Row]:
        """The jobs whose process was last seen alive, whatever their state."""
        return self.store.rows("SELECT * FROM jobs WHERE process IS NOT NULL ORDER BY seq")

    def using(self, file: str) -> Row | None:
        """A job that has not ended and reads a file."""
        marks = ", ".join("?" * len(OPEN))
        query = f"SELECT * FROM jobs WHERE status IN ({marks}) AND ? IN (training_file, validation_file) LIMIT 1"
        return self.store.row(query, [*OPEN, file])

    def move(self, job: str, to: str, *, only_from: Sequence[str], **values: Any) -> bool:
        """Change a job's state, if it is in one of some states; whether it was."""
        columns = "".join(f", {name} = ?" for name in values)
        marks = ", ".join("?" * len(only_from))
        query = f"UPDATE jobs SET status = ?{columns} WHERE id = ? AND status IN ({marks})"
        return bool(self.store.write(query, [to, *values.values(), job, *only_from]))

    def say(self, job: str, message: str, level: str = "info", data: Mapping[str, Any] | None = None) -> None:
        """Add an event. One with data is of the type `metrics`."""
        self.store.insert(
            "events",
            {
                "id": new_id("ftevent"),
                "job": job,
                "created_at": now(),
                "level": level,
                "message": message,
                "type": "message" if data is None else "metrics",
                "data": None if data is None else json.dumps(data),
            },
        )

    def wait(self, job: Row, reason: str) -> None:
        """Say once why a queued job waits."""
        if job["waits_for"] != reason:
            with self.store.together():
                self.store.update("jobs", job["id"], waits_for=reason)
                self.say(job["id"], f"The job waits: {reason}")

    def pause(self, job: str, reason: str) -> None:
        """Let a job wait until somebody resumes it, for a reason that is not its client's."""
        with self.store.together():
            if self.move(job, PAUSED, only_from=(VALIDATING, RUNNING), process=None, waits_for=None):
                self.say(job, f"The job was paused: {reason}", "warn")

    def fail(self, job: str, code: str, message: str, param: str | None = None) -> None:
        """End a job that can't be trained."""
        error = json.dumps({"code": code, "message": message, "param": param})
        with self.store.together():
            if self.move(job, FAILED, only_from=OPEN, error=error, finished_at=now(), process=None):
                self.say(job, f"The job failed: {message}", "error")
