"""Keeps the jobs of a server going: it has their files looked at, starts those that fit, and watches their processes.

What a job is to be stands in its row (`status`), and what is there beside it (`process`). Each round brings the second
to the first, so a server that was killed goes on where it was: nothing that counts is in memory alone.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from typing import Any

import yaml

from phinetune import ray_cluster
from phinetune.errors import MACHINE_FAULT, PhinetuneError
from phinetune.files import write_text
from phinetune.ray_cluster import ADDRESS
from phinetune.serving.job_config import chosen_numbers, final_config, first_config
from phinetune.serving.job_end import succeed
from phinetune.serving.job_places import JobPlaces
from phinetune.serving.job_process import JobsHere, last_errors
from phinetune.serving.job_progress import Progress
from phinetune.serving.job_request import JobRequest
from phinetune.serving.job_runner import STOPPED, USERS_MISTAKE, JobRunner, Record
from phinetune.serving.job_table import CANCELLED, OPEN, QUEUED, RUNNING, VALIDATING, JobTable
from phinetune.serving.jobs_on_ray import KEY, JobsOnRay
from phinetune.serving.state import ServerState
from phinetune.serving.store import Row
from phinetune.serving.workshop import ServersFault, WorkFailed, Workshop

logger = logging.getLogger(__name__)

ROUND_S = 0.5
PLAN_S = 3600.0  # a plan may take, with a large file
# How often a job is started again without a new checkpoint in between: after deaths from outside, and after errors of
# its own, which the next try is likely to meet again.
MOST_DEATHS, MOST_CRASHES = 5, 2
ASK_AGAIN_S = 15.0


class JobKeeper:
    """Two threads: one plans jobs, one starts and watches them."""

    def __init__(self, state: ServerState, workshop: Workshop) -> None:
        self.state, self.workshop = state, workshop
        self.jobs = JobTable(state.store)
        here = JobsHere(state.settings)
        self.runners: tuple[JobRunner, ...] = (JobsOnRay(state.settings), here) if ray_cluster.address() else (here,)
        self._progress: dict[str, Progress] = {}
        self._asked: dict[str, float] = {}
        self._stop, self._news = threading.Event(), threading.Event()
        self._threads = [
            threading.Thread(target=self._rounds, args=(work,), name=name, daemon=True)
            for name, work in (("jobs", self.round), ("plans", self.plan_next))
        ]

    def start(self) -> None:
        """Find the processes that another server left running, and begin."""
        self.adopt()
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """End the threads. Jobs train on; the next server finds them."""
        self._stop.set()
        self._news.set()
        self.workshop.close()
        for thread in self._threads:
            if thread.is_alive():
                thread.join(5)

    def wake(self) -> None:
        """Look at the jobs now."""
        self._news.set()

    def places(self, job: Row) -> JobPlaces:
        return JobPlaces(self.state.folder, job["id"])

    def adopt(self) -> None:
        """Record processes that were started in the moment in which a server was killed."""
        lone = {self.places(job).config: job for job in self.jobs.in_states(*OPEN, CANCELLED) if not job["process"]}
        for runner in self.runners:
            for config, process in runner.find(lone).items():
                self.state.store.update("jobs", lone[config]["id"], process=json.dumps(process))

    @property
    def runner(self) -> JobRunner:
        """What trains the jobs that are started now."""
        return self.runners[0]

    def _runner_of(self, process: Record) -> JobRunner | None:
        """What trains a job that was started before; None if it is a cluster that this server was not told of."""
        wanted = JobsOnRay if KEY in process else JobsHere
        return next((one for one in self.runners if isinstance(one, wanted)), None)

    def _rounds(self, work: Any) -> None:
        while not self._stop.is_set():
            try:
                work()
            except Exception:
                if not self._stop.is_set():
                    logger.exception("a round over the jobs failed; the next one comes in %g s", ROUND_S)
            self._news.wait(ROUND_S)
            self._news.clear()

    def plan_next(self) -> None:
        """Plan the jobs whose files are to be looked at."""
        for job in self.jobs.in_states(VALIDATING):
            if self._stop.is_set():
                return
            try:
                self._plan(job)
            except ServersFault as error:
                logger.warning("%s can't be planned: %s", job["id"], error)
                self.jobs.pause(job["id"], f"it can't be planned now: {_without_places(error, self)}")
            except PhinetuneError as error:
                self.jobs.fail(job["id"], "invalid_training_file", _without_places(error, self), "training_file")
            except WorkFailed as error:
                if not self._stop.is_set():
                    self.jobs.fail(job["id"], "planning_failed", f"planning the job failed: {error}")

    def _plan(self, job: Row) -> None:
        first, request = first_config(job, self.state.folder), JobRequest.model_validate_json(job["request"])
        made = self.workshop.do("plan", {"config": first}, PLAN_S)
        lacking = self.runner.what_lacks(made)
        if lacking:
            self.jobs.fail(job["id"], *lacking)
            return
        final = final_config(first, made, request.wanted.learning_rate_multiplier)
        write_text(self.places(job).config, yaml.safe_dump(final, sort_keys=False, allow_unicode=True), private=True)
        values = {
            "chosen": json.dumps(chosen_numbers(final, request)),
            "memory": made["memory"] if made["on_cpu"] else 0,
            "seconds": made["seconds"],
        }
        with self.state.store.together():
            if self.jobs.move(job["id"], QUEUED, only_from=[VALIDATING], **values):
                self.jobs.say(job["id"], "Files validated, moving job to queued state")
                for note in made["notes"]:
                    self.jobs.say(job["id"], note, "warn")
            else:  # it was paused or cancelled meanwhile
                self.state.store.update("jobs", job["id"], **values)
        self.wake()

    def round(self) -> None:
        """Bring every job one step nearer to what it is to be."""
        for job in self.jobs.with_process():
            self._watch(job)
        for job in self.jobs.in_states(RUNNING):
            if not job["process"]:  # the server was killed before it could start it, or before it saw its end
                self._ended(job)
        self._start_queued()

    def _start_queued(self) -> None:
        """Start what can start now, first come, first served: small jobs could keep a large one waiting for ever."""
        before: str | None = None  # the one that waits just before: it changes less often than the first of all
        for job in self.jobs.in_states(QUEUED):
            if self._stop.is_set():
                return
            if job["process"]:  # it was resumed, and its process has not ended yet
                continue
            reason = f"{before} is before it" if before else self.runner.why_wait(job, self.jobs.with_process())
            if reason:
                self.jobs.wait(job, reason)
                before = job["id"]
            else:
                self._start(job)

    def _watch(self, job: Row) -> None:
        process = json.loads(job["process"])
        runner = self._runner_of(process)
        if runner is None:
            self._leave(job)
            return
        ended = runner.ended(process)
        if ended is not None:
            self._ended(job, ended.status)
        elif job["status"] == RUNNING:
            self._tell_waiting(job, runner.waits(process))
            self._look(job)
        elif job["status"] == CANCELLED:
            runner.kill(process)
        elif time.monotonic() - self._asked.get(job["id"], -ASK_AGAIN_S) >= ASK_AGAIN_S:  # paused, or resumed already
            self._asked[job["id"]] = time.monotonic()
            runner.ask_to_stop(process)

    def _leave(self, job: Row) -> None:
        """What becomes of a job on a cluster that this server was not told of: it waits, until somebody cancels it."""
        if job["status"] == CANCELLED:
            told = "The job may still train on a Ray cluster that this server was not told of"
            with self.state.store.together():
                self.state.store.update("jobs", job["id"], process=None)
                self.jobs.say(job["id"], told, "warn")
        else:
            self.jobs.wait(job, f"it trains on a Ray cluster, and {ADDRESS} does not say where that is")

    def _tell_waiting(self, job: Row, reason: str | None) -> None:
        """Keep what a job waits for that was started."""
        if reason:
            self.jobs.wait(job, reason)
        elif job["waits_for"]:
            self.state.store.update("jobs", job["id"], waits_for=None)

    def _look(self, job: Row) -> None:
        progress = self._progress.setdefault(job["id"], Progress(self.state, self.places(job), self.jobs))
        progress.look(job)

    def _start(self, job: Row) -> None:
        """Start a queued job's process. The row says so first: a process without a row would be lost."""
        places, again = self.places(job), self.places(job).run.is_run
        where = _newest(places)
        message = f"Fine-tuning job goes on {where}" if again else "Fine-tuning job started"
        finish = int(time.time() + job["seconds"]) if job["seconds"] else None
        with self.state.store.together():
            if not self.jobs.move(job["id"], RUNNING, only_from=[QUEUED], waits_for=None, estimated_finish=finish):
                return
            self.jobs.say(job["id"], message)
        try:
            process = self.runner.start(job, places, _wandb_environment(job))
        except PhinetuneError as error:
            if self.jobs.move(job["id"], QUEUED, only_from=[RUNNING]):
                self.jobs.wait(job, str(error))
            return
        self._asked.pop(job["id"], None)
        self.state.store.update("jobs", job["id"], process=json.dumps(process))

    def _ended(self, job: Row, status: int | None = None) -> None:
        """What becomes of a job whose process is gone."""
        places = self.places(job)
        self._look(job)
        self._progress.pop(job["id"], None)
        job = self.jobs.get(job["id"]) or job
        if places.run.is_finished and job["status"] != CANCELLED:
            succeed(self.state, self.jobs, job, places)
        elif job["status"] == RUNNING:
            self._go_on(job, status, places)
        else:
            self.state.store.update("jobs", job["id"], process=None)

    def _go_on(self, job: Row, status: int | None, places: JobPlaces) -> None:
        """Put a job whose process ended early back into the queue, or give it up."""
        if status in (USERS_MISTAKE, MACHINE_FAULT):
            self._refused(job, status, places)
            return
        kind, most = ("crashes", MOST_CRASHES) if status and status > 0 else ("deaths", MOST_DEATHS)
        count, why = job[kind] + 1, "ended unexpectedly" + (f" (status {status})" if status else "")
        if status == STOPPED:
            count, why = job[kind], "was asked to stop from outside"
        if count > most:
            message = f"the process that trains the job {why}, {count} times without a new checkpoint"
            self.jobs.fail(job["id"], "training_crashed", message)
            return
        with self.state.store.together():
            if self.jobs.move(job["id"], QUEUED, only_from=[RUNNING], process=None, **{kind: count}):
                self.jobs.say(job["id"], f"The process that trains the job {why}; it goes on {_newest(places)}", "warn")

    def _refused(self, job: Row, status: int, places: JobPlaces) -> None:
        """What becomes of a job whose run said why it can't go on. What the machine lacks may be there later."""
        told = "; ".join(last_errors(places.log) or ["the run stopped; the server's log names the reason"])
        logger.warning("%s: %s", job["id"], told)
        if status == MACHINE_FAULT:
            self.jobs.pause(job["id"], f"{_hidden(told, self)}. Resumed, it goes on {_newest(places)}")
        else:
            self.jobs.fail(job["id"], "training_failed", _hidden(told, self))


def _newest(places: JobPlaces) -> str:
    checkpoints = places.run.checkpoints()
    return f"from {checkpoints[-1].name}" if checkpoints else "from its beginning"


def _wandb_environment(job: Row) -> dict[str, str]:
    request = JobRequest.model_validate_json(job["request"])
    if not request.integrations:
        return {}
    wanted = request.integrations[0].wandb
    given = {
        "WANDB_PROJECT": wanted.project,
        "WANDB_NAME": wanted.name or job["id"],
        "WANDB_ENTITY": wanted.entity,
        "WANDB_TAGS": ",".join(wanted.tags or []),
    }
    return {key: value for key, value in given.items() if value}


def _without_places(error: PhinetuneError, keeper: JobKeeper) -> str:
    return _hidden("\n".join(error.problems[:20]), keeper)


def _hidden(text: str, keeper: JobKeeper) -> str:
    """A text without the places of this server's files: they are nothing to a client."""
    return text.replace(f"{keeper.state.folder}{os.sep}", "")
