"""Turns what a running job writes into its events and checkpoints."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from phinetune.serving.catalogue import tuned_name
from phinetune.serving.ids import new_id, now
from phinetune.serving.job_metrics import Entry, Tail, at_step, read_entries, shown, told
from phinetune.serving.job_places import JobPlaces
from phinetune.serving.job_table import JobTable
from phinetune.serving.state import ServerState
from phinetune.serving.store import Row


class Progress:
    """Looks at the folder of one job's run."""

    def __init__(self, state: ServerState, places: JobPlaces, jobs: JobTable) -> None:
        self._state, self._places, self._jobs = state, places, jobs
        self._tail = Tail(places.run.metrics)
        self._steps: int | None = None

    def look(self, job: Row) -> None:
        """Add what is new since the last look."""
        entries = self._tail.new()
        if entries:
            self._steps = self._steps or self._places.run.read_start().get("steps")
            self._tell(job, entries)
        self._checkpoints(job)

    def _tell(self, job: Row, entries: Sequence[Entry]) -> None:
        """Add an event for each entry that was not told before: steps after a checkpoint may be done twice."""
        told_step, told_valid = job["told_step"], job["told_valid"]
        with self._state.store.together():
            for entry in entries:
                trained = "loss" in entry
                if entry["step"] <= (told_step if trained else told_valid):
                    continue
                data = {**shown(entry), "total_steps": self._steps}
                self._jobs.say(job["id"], told(entry, self._steps), data=data)
                if trained:
                    told_step = entry["step"]
                else:
                    told_valid = entry["step"]
            values: dict[str, Any] = {"told_step": told_step, "told_valid": told_valid}
            finish = self._tail.finish(self._steps) if self._steps else None
            if finish:
                values["estimated_finish"] = finish
            self._state.store.update("jobs", job["id"], **values)

    def _checkpoints(self, job: Row) -> None:
        """Offer checkpoints that are new, and no longer those that the run has deleted."""
        there = {int(folder.name.rpartition("-")[2]): folder for folder in self._places.run.checkpoints()}
        rows = self._state.store.rows("SELECT step, model FROM checkpoints WHERE job = ?", [job["id"]])
        known = {row["step"]: row["model"] for row in rows}
        if there.keys() == known.keys():
            return
        entries = read_entries(self._places.run.metrics)
        with self._state.store.together():
            for step in sorted(there.keys() - known.keys()):
                self._offer(job, step, at_step(entries, step))
            for step in known.keys() - there.keys():
                self._state.store.write("DELETE FROM checkpoints WHERE job = ? AND step = ?", [job["id"], step])
                self._state.models.delete(known[step])
            self._state.store.update("jobs", job["id"], deaths=0, crashes=0)

    def _offer(self, job: Row, step: int, metrics: dict[str, Any]) -> None:
        name = tuned_name(job["base_id"], job["suffix"], job["id"], step)
        row = {"id": new_id("ftckpt"), "job": job["id"], "created_at": now(), "step": step, "model": name}
        self._state.store.insert("checkpoints", {**row, "metrics": json.dumps(metrics)})
        self._state.models.add(name, json.loads(job["base"]), self._places.run.path / f"checkpoint-{step}", job["id"])
        self._jobs.say(job["id"], f"Checkpoint created at step {step}")
