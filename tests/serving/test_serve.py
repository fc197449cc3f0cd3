"""A day of a server: upload, train, kill the server, pause, resume, kill the job, and have the model all the same."""

from __future__ import annotations

import json
import os
import signal
import stat
from pathlib import Path
from typing import Any

import openai
import pytest

from helpers import chat
from phinetune.liveness import is_alive
from phinetune.run_folder import RunFolder
from phinetune.serving.store import Store
from serving.serving_helpers import ServerProcess, ask, until

ROWS = [chat(f"Say {i}", f"It is {i}.") for i in range(48)]
EPOCH = 24  # steps: 48 rows, 2 a step
STEPS = 10 * EPOCH


def lines(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def process_of(folder: Path, job: str) -> dict[str, Any] | None:
    """The process that a job's row names."""
    store = Store(folder / "server.sqlite")
    try:
        row = store.row("SELECT process FROM jobs WHERE id = ?", [job])
    finally:
        store.close()
    return json.loads(row["process"]) if row and row["process"] else None


@pytest.mark.slow
def test_a_job_survives_the_server_and_its_own_process(tmp_path: Path) -> None:
    folder = tmp_path / "server"
    server = ServerProcess(folder)
    client = server.start()
    jobs = client.fine_tuning.jobs
    try:
        file = client.files.create(file=("../rows.jsonl", lines(ROWS)), purpose="fine-tune")
        held = client.files.create(file=("held.jsonl", lines(ROWS[:3])), purpose="fine-tune")
        assert (file.filename, file.bytes, file.status) == ("rows.jsonl", len(lines(ROWS)), "processed")
        with pytest.raises(openai.BadRequestError) as refused:
            client.files.create(file=("bad.jsonl", lines([ROWS[0], {"messages": []}, {"a": 1}])), purpose="fine-tune")
        assert isinstance(refused.value.body, dict)
        assert refused.value.body["code"] == "invalid_file_format"
        assert [one["line"] for one in refused.value.body["lines"]] == [3]
        job = jobs.create(
            model="tiny",
            training_file=file.id,
            validation_file=held.id,
            suffix="my-shop",
            seed=7,
            method={
                "type": "supervised",
                "supervised": {"hyperparameters": {"n_epochs": 10, "batch_size": 2, "learning_rate_multiplier": 0.5}},
            },
        )
        assert job.status == "validating_files"
        behind = jobs.create(model="tiny", training_file=file.id)
        # The server is killed when the job's process has begun. The next one finds the process and watches it.
        trained_by = until(lambda: process_of(folder, job.id))
        os.kill(trained_by["pid"], signal.SIGSTOP)  # else it could be done before the next server has begun
        server.kill()
        assert is_alive(trained_by)
        client = server.start()
        jobs = client.fine_tuning.jobs
        assert client.files.content(file.id).content == lines(ROWS)
        assert process_of(folder, job.id) == trained_by
        reasons = until(lambda: [one.message for one in jobs.list_events(behind.id) if "waits" in one.message])
        assert reasons == [f"The job waits: {job.id} trains, and this server trains one job at a time"]
        assert jobs.cancel(behind.id).status == "cancelled"

        os.kill(trained_by["pid"], signal.SIGCONT)
        # Paused, it saves and ends; resumed and killed at once, it goes on by itself.
        until(lambda: jobs.checkpoints.list(job.id).data)
        assert jobs.pause(job.id).status == "paused"
        until(lambda: not process_of(folder, job.id))
        assert not is_alive(trained_by)
        assert jobs.resume(job.id).status == "queued"
        os.kill(until(lambda: process_of(folder, job.id))["pid"], signal.SIGKILL)
        until(lambda: any("ended unexpectedly" in one.message for one in jobs.list_events(job.id)))
        done = until(lambda: (found := jobs.retrieve(job.id)).status in ("succeeded", "failed") and found)
        check_done(client, done, folder)
        client.close()
        status, seconds = server.stop()
        assert (status, seconds < 10) == (0, True)
    finally:
        server.kill()


def check_done(client: openai.OpenAI, done: Any, folder: Path) -> None:
    """Nothing was lost and nothing told twice; the folder is a run as any other."""
    assert done.status == "succeeded", done.error
    assert done.fine_tuned_model == f"ft:tiny:phinetune:my-shop:{done.id.removeprefix('ftjob-')}"
    assert done.hyperparameters.model_dump() == {"batch_size": 2, "learning_rate_multiplier": 0.5, "n_epochs": 10}
    assert done.trained_tokens > 0
    assert done.finished_at >= done.created_at
    events = list(client.fine_tuning.jobs.list_events(done.id, limit=90))  # several pages
    steps = [one.data["step"] for one in events if one.type == "metrics" and "train_loss" in one.data]
    assert steps == list(range(STEPS, 0, -1))
    assert events[0].message == "The job has successfully completed"
    kept = client.fine_tuning.jobs.checkpoints.list(done.id).data
    assert [one.step_number for one in kept] == [STEPS, STEPS - EPOCH, STEPS - 2 * EPOCH]
    assert kept[0].metrics.full_valid_loss == kept[0].metrics.valid_loss > 0
    table = client.files.content(done.result_files[0]).text.splitlines()
    assert table[0] == "step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy"
    assert [int(line.split(",")[0]) for line in table[1:]] == list(range(1, STEPS + 1))
    assert "" not in table[-1].split(",")

    run = RunFolder(folder / "runs" / done.id)
    assert run.is_finished
    assert (run.path / "report.html").is_file()
    assert run.read_config().training_config["seed"] == 7
    names = {model.id for model in client.models.list()}
    assert {"tiny", done.fine_tuned_model, kept[0].fine_tuned_model_checkpoint} <= names
    assert len(names) == 5
    assert client.models.delete(done.fine_tuned_model).deleted
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve(done.fine_tuned_model)
    assert stat.S_IMODE((folder / "key").stat().st_mode) == 0o600
    numbers = ask(client, "GET", "/metrics")[1]["text"]
    assert 'phinetune_jobs{status="succeeded"} 1' in numbers.splitlines()
