"""The jobs of a server on a Ray cluster: as many at a time as it has room for, and nothing lost by any death."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from helpers import chat
from phinetune.errors import ConfigError, RunError
from phinetune.serving.job_places import JobPlaces
from phinetune.serving.job_table import CANCELLED, RUNNING, JobTable, shown_status
from phinetune.serving.jobs_on_ray import JobsOnRay, command
from phinetune.serving.keeper import JobKeeper
from phinetune.serving.settings import ServerSettings
from ray_nodes import two_nodes
from serving.serving_helpers import ServerProcess, threaded, until
from serving.test_serve import lines, process_of

ROWS = [chat(f"Say {i}", f"It is {i}.") for i in range(32)]


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    with two_nodes() as address:
        yield address


def trained_by(config: Path) -> list[psutil.Process]:
    """The processes that train with a configuration, on whatever node."""
    found = psutil.process_iter(["cmdline"])
    return [one for one in found if {str(config), "train", "-m"} <= set(one.info["cmdline"] or [])]


def adapter(folder: Path, job: str) -> dict[str, torch.Tensor]:
    return dict(load_file(folder / "runs" / job / "adapter_model.safetensors"))


@pytest.mark.slow
def test_jobs_train_on_both_nodes_wait_for_room_and_outlive_servers_and_processes(
    cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "server"
    server = ServerProcess(folder, at_once=None)
    client = server.start()
    jobs = client.fine_tuning.jobs
    try:
        file = client.files.create(file=("rows.jsonl", lines(ROWS)), purpose="fine-tune").id
        wanted = {"n_epochs": 50, "batch_size": 2}
        made = [jobs.create(model="tiny", training_file=file, seed=7, hyperparameters=wanted).id for _ in range(3)]
        configs = [folder / "jobs" / f"{job}.yaml" for job in made]
        first, second = (until(lambda config=config: trained_by(config))[0] for config in configs[:2])  # at once
        for one in (first, second):
            one.suspend()  # so that there is no room for the third as long as this looks
        told = until(lambda: [one.message for one in jobs.list_events(made[2]) if "no room" in one.message])
        assert told == ["The job waits: the Ray cluster has no room for it now"]
        assert jobs.retrieve(made[2]).status == "queued"

        server.kill()
        client = server.start()
        jobs = client.fine_tuning.jobs
        first.resume()
        until(lambda: jobs.checkpoints.list(made[0]).data)
        assert jobs.pause(made[0]).status == "paused"
        until(lambda: not process_of(folder, made[0]))
        assert "Stopped after step" in (folder / "jobs" / f"{made[0]}.log").read_text(), "its step is done and saved"
        assert jobs.resume(made[0]).status == "queued"
        second.resume()
        until(lambda: jobs.checkpoints.list(made[1]).data)
        os.kill(trained_by(configs[1])[0].pid, signal.SIGKILL)
        for job in made:
            assert until(lambda job=job: (one := jobs.retrieve(job)).finished_at and one).status == "succeeded"
        assert any("ended unexpectedly" in one.message for one in jobs.list_events(made[1]))
        same = [adapter(folder, job) for job in made]
        assert all(torch.equal(same[0][name], other[name]) for other in same[1:] for name in same[0])
    finally:
        server.kill()
    monkeypatch.delenv("RAY_ADDRESS")
    alone = ServerProcess(tmp_path / "alone")
    try:
        client = alone.start()
        file = client.files.create(file=("rows.jsonl", lines(ROWS)), purpose="fine-tune").id
        job = client.fine_tuning.jobs.create(model="tiny", training_file=file, seed=7, hyperparameters=wanted).id
        until(lambda: client.fine_tuning.jobs.retrieve(job).finished_at)
        here = adapter(tmp_path / "alone", job)
        assert all(torch.equal(same[0][name], here[name]) for name in here)
    finally:
        alone.kill()


@pytest.mark.slow
def test_a_cluster_knows_what_it_will_never_have_room_for(cluster: str) -> None:
    runner = JobsOnRay(ServerSettings())
    plan = {"memory": 10**12, "on_cpu": True, "disk": 1, "free_disk": 2}
    assert "no node of the Ray cluster gives it more than" in (runner.what_lacks(plan) or ("", ""))[1]
    assert (runner.what_lacks({**plan, "free_disk": 0}) or ("",))[0] == "insufficient_disk"
    assert runner.what_lacks({**plan, "memory": 1}) is None
    ended = runner.ended({"ray": "ftjob-of-a-cluster-before"})
    assert ended is not None
    assert ended.status is None


class Silent(BaseHTTPRequestHandler):
    """A cluster that says its version, and answers to nothing else."""

    def do_GET(self) -> None:
        if self.path != "/api/version":
            self.send_error(503)
            return
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(b'{"version": "4", "ray_version": "2.60.0", "ray_commit": "a"}')

    do_POST = do_GET

    def log_message(self, *args: Any) -> None:
        pass


def test_a_cluster_that_does_not_answer_ends_no_job(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("ray")
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(ConfigError, match="no cluster is there"):
        JobsOnRay(ServerSettings())
    server = HTTPServer(("127.0.0.1", 0), Silent)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        monkeypatch.setenv("RAY_ADDRESS", f"http://127.0.0.1:{server.server_address[1]}")
        runner = JobsOnRay(ServerSettings())
        assert runner.ended({"ray": "ftjob-1"}) is None
        assert runner.ended({"ray": "ftjob-1"}) is None
        assert runner.what_lacks({"memory": 1, "on_cpu": True, "disk": 1, "free_disk": 2}) is None
        with pytest.raises(RunError, match="the Ray cluster does not take it now"):
            runner.start({"id": "ftjob-1", "memory": 1}, JobPlaces(tmp_path, "ftjob-1"), {})
    finally:
        server.shutdown()
        server.server_close()
    assert caplog.text.count("ftjob-1: the Ray cluster does not answer") == 1


def test_a_job_on_a_cluster_that_the_server_was_not_told_of_waits_until_it_is_cancelled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)  # the other tests' nodes may be there
    with threaded(tmp_path) as (state, _):
        job = {"id": "ftjob-1", "created_at": 1, "request": "{}", "model": "tiny", "base": "{}", "base_id": "tiny"}
        rest = {"suffix": "", "seed": 1, "training_file": "file-1", "process": '{"ray": "ftjob-1-abc"}'}
        state.store.insert("jobs", {**job, **rest, "status": RUNNING})
        keeper, table = JobKeeper(state, state.workshop), JobTable(state.store)
        keeper.round()
        (left,) = table.in_states(RUNNING)
        assert left["waits_for"] == "it trains on a Ray cluster, and RAY_ADDRESS does not say where that is"
        assert shown_status(left) == "queued"
        table.move("ftjob-1", CANCELLED, only_from=[RUNNING])
        keeper.round()
        assert table.with_process() == []
        (told,) = state.store.rows("SELECT message FROM events WHERE level = 'warn'")
        assert told["message"] == "The job may still train on a Ray cluster that this server was not told of"


def test_a_nodes_shell_runs_this_python_with_any_folder(tmp_path: Path) -> None:
    places = JobPlaces(tmp_path / "a folder; with 'signs'", "ftjob-1")
    places.config.parent.mkdir(parents=True)
    places.config.write_text("model: {path: starter}\nnonsense: 1\n")
    assert os.system(command(places)) >> 8 == 2
    assert "there is no key `nonsense`" in places.log.read_text()
