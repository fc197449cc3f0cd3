"""What becomes of jobs: when their process ends, when they wait, and when they can't be planned."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import psutil
import pytest
from openai import OpenAI

from helpers import chat, write_jsonl
from phinetune.config.model import ModelSection
from phinetune.liveness import process_record
from phinetune.serving.job_places import JobPlaces, file_place
from phinetune.serving.job_process import JobsHere
from phinetune.serving.job_queue import PROGRAM
from phinetune.serving.job_runner import Record
from phinetune.serving.keeper import MOST_CRASHES, MOST_DEATHS, JobKeeper
from phinetune.serving.state import ServerState
from phinetune.serving.store import Row
from serving.serving_helpers import keep_file, threaded, until
from test_run_folder import make_run

KILLED = "kill -9 $$"
DISK_FULL = "echo 'error: {folder}/runs/a: no space is left' >> {log}; exit 71"


class Shells(JobsHere):
    """Starts a shell in place of a run. Each does the next one of `scripts`; with none left, jobs wait."""

    scripts: Sequence[str] = ()

    def start(self, job: Row, places: JobPlaces, environment: Mapping[str, str]) -> Record:
        script, *self.scripts = self.scripts
        command = f"sleep 0.1; {script.format(log=places.log, folder=places.folder)}"
        child = subprocess.Popen(["sh", "-c", command], start_new_session=True)
        self._children[child.pid] = child
        return process_record(child.pid)

    def why_wait(self, job: Row, others: Sequence[Row]) -> str | None:
        return super().why_wait(job, others) if self.scripts else "there is no script left"


class Kept:
    """A server whose jobs are kept in rounds that the test makes, and trained by shells."""

    def __init__(self, state: ServerState, client: OpenAI) -> None:
        self.state, self.client, self.jobs = state, client, client.fine_tuning.jobs
        self.keeper, self.shells = JobKeeper(state, state.workshop), Shells(state.settings)
        self.keeper.runners = (self.shells,)
        keep_file(state, "file-chat")

    def queued(self, memory: int = 1, **counted: int) -> str:
        """A new job that counts as planned."""
        job = self.jobs.create(model="tiny", training_file="file-chat").id
        self.state.store.update("jobs", job, status="queued", memory=memory, **counted)
        return job

    def train(self, *scripts: str) -> None:
        """Make rounds until the processes that do these scripts have ended."""
        self.shells.scripts = scripts
        until(lambda: self.keeper.round() or not (self.shells.scripts or self.keeper.jobs.with_process()))

    def told(self, job: str) -> list[str]:
        """What a job's events say, oldest first."""
        return [one.message for one in self.jobs.list_events(job)][::-1]


@pytest.fixture
def kept(tmp_path: Path) -> Iterator[Kept]:
    with threaded(tmp_path / "server", at_once=1) as (state, client):
        yield Kept(state, client)


def test_a_fault_of_the_machine_pauses_a_job_and_it_is_resumed_from_its_checkpoint(kept: Kept) -> None:
    job = kept.queued()
    run = make_run(kept.state.folder / "runs" / job, checkpoints=(3,))
    kept.train(DISK_FULL)
    found = kept.jobs.retrieve(job)
    assert (found.status, found.error, found.finished_at) == ("paused", None, None)
    assert kept.told(job)[-1] == "The job was paused: runs/a: no space is left. Resumed, it goes on from checkpoint-3"
    assert kept.jobs.resume(job).status == "queued"
    run.write_results({})
    kept.train("exit 0")
    assert kept.jobs.retrieve(job).status == "succeeded"
    assert "Fine-tuning job goes on from checkpoint-3" in kept.told(job)


def test_a_users_mistake_ends_a_job(kept: Kept) -> None:
    job = kept.queued()
    kept.train("echo 'error: the loss is not finite' >> {log}; exit 2")
    found = kept.jobs.retrieve(job)
    assert (found.status, found.error and found.error.message) == ("failed", "the loss is not finite")


def test_deaths_from_outside_and_errors_of_its_own_are_counted_apart(kept: Kept) -> None:
    job = kept.queued(deaths=MOST_DEATHS)
    kept.train("exit 75", *["exit 1"] * MOST_CRASHES)
    assert kept.jobs.retrieve(job).status == "queued"
    kept.train("exit 1")
    found = kept.jobs.retrieve(job)
    assert found.status == "failed"
    assert found.error
    assert found.error.message == (
        "the process that trains the job ended unexpectedly (status 1), 3 times without a new checkpoint"
    )


def test_a_job_that_is_killed_again_and_again_is_given_up_unless_it_gets_further(kept: Kept) -> None:
    job = kept.queued(deaths=MOST_DEATHS, crashes=MOST_CRASHES)
    make_run(kept.state.folder / "runs" / job, checkpoints=(3,))
    kept.train(KILLED, "exit 1")
    assert kept.jobs.retrieve(job).status == "queued"
    kept.state.store.update("jobs", job, deaths=MOST_DEATHS)
    kept.train(KILLED)
    assert kept.jobs.retrieve(job).status == "failed"


def test_one_reason_to_wait_is_told_once(kept: Kept) -> None:
    job = kept.queued(memory=psutil.virtual_memory().total)
    kept.shells.scripts = ("exit 0",)
    kept.keeper.round()
    held = b"x" * 300_000_000  # memory that was free in the first round
    kept.keeper.round()
    del held
    assert [one for one in kept.told(job) if "waits" in one] == [
        f"The job waits: it needs {(psutil.virtual_memory().total + PROGRAM) / 1e9:.1f} GB of memory, and less is free"
    ]


def test_each_waiting_job_is_told_why_and_none_overtakes_another(kept: Kept) -> None:
    large, second, third = kept.queued(memory=psutil.virtual_memory().total), kept.queued(), kept.queued()
    kept.shells.scripts = ("sleep 60", "exit 0")
    kept.keeper.round()
    assert kept.told(second)[-1] == f"The job waits: {large} is before it"
    assert kept.told(third)[-1] == f"The job waits: {second} is before it"
    assert kept.keeper.jobs.with_process() == []
    kept.jobs.cancel(large)
    kept.keeper.round()
    try:
        assert kept.jobs.retrieve(second).status == "running"
        waits = [one for one in kept.told(third) if "waits" in one]
        assert waits[1:] == [f"The job waits: {second} trains, and this server trains one job at a time"]
    finally:
        kept.jobs.cancel(second)
        until(lambda: kept.keeper.round() or not kept.keeper.jobs.with_process())


def test_a_base_that_is_not_there_pauses_a_job_until_it_can_be_planned(tmp_path: Path) -> None:
    models = {"mini": ModelSection(path=str(tmp_path / "mini"))}
    with threaded(tmp_path / "server", models=models) as (state, client):
        kept = Kept(state, client)
        write_jsonl(file_place(state.folder, "file-chat"), [chat(f"Say {i}", f"It is {i}.") for i in range(8)])
        job = kept.jobs.create(model="mini", training_file="file-chat").id
        kept.keeper.plan_next()
        assert kept.jobs.retrieve(job).status == "paused"
        assert kept.told(job)[-1].startswith("The job was paused: it can't be planned now: ")
        assert "mini" in kept.told(job)[-1]
        assert kept.jobs.resume(job).status == "validating_files"
