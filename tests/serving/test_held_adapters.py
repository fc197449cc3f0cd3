"""A checkpoint that a job or an export was promised is there, though its run deletes it meanwhile."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
import yaml

from helpers import TINY, chat, write_jsonl
from phinetune.config.model import ModelSection
from phinetune.serving.held_adapters import sweep_held
from phinetune.serving.job_places import JobPlaces, file_place
from phinetune.serving.keeper import JobKeeper
from phinetune.serving.page.exports import ExportKeeper, ExportPlaces
from phinetune.serving.state import ServerState
from serving.serving_helpers import ask, keep_file, threaded, until

NAME = "ft:tiny:phinetune:my-shop:abcdefghijkl:ckpt-step-2"
Served = tuple[ServerState, openai.OpenAI, Path]


@pytest.fixture
def served(tmp_path: Path, tiny_run: Path) -> Iterator[Served]:
    """A server, a client, and a checkpoint of a run that it offers."""
    with threaded(tmp_path / "server") as (state, client):
        run = state.folder / "runs" / "ftjob-abcdefghijkl"
        shutil.copytree(tiny_run, run)
        state.models.add(NAME, ModelSection(path=TINY).model_dump(), run / "checkpoint-2", run.name)
        write_jsonl(file_place(state.folder, keep_file(state, "file-a")), [chat(f"q {i}", f"a {i}") for i in range(8)])
        yield state, client, run / "checkpoint-2"


def test_a_job_goes_on_from_a_checkpoint_that_was_deleted_meanwhile(served: Served) -> None:
    state, client, checkpoint = served
    weights = (checkpoint / "adapter_model.safetensors").read_bytes()
    job = client.fine_tuning.jobs.create(model=NAME, training_file="file-a").id
    shutil.rmtree(checkpoint)
    keeper = JobKeeper(state, state.workshop)
    keeper.plan_next()
    assert client.fine_tuning.jobs.retrieve(job).status == "queued"
    config = yaml.safe_load(JobPlaces(state.folder, job).config.read_text())
    adapter = Path(config["model"]["adapter"])
    assert (adapter / "adapter_model.safetensors").read_bytes() == weights
    assert not list(adapter.glob("*.pt"))  # the optimizer is twice as large, and not gone on with


def test_an_export_is_made_of_a_checkpoint_that_was_deleted_meanwhile(served: Served) -> None:
    state, client, checkpoint = served
    made = ask(client, "POST", "/phinetune/exports", {"model": NAME, "target": "merge"})[1]
    shutil.rmtree(checkpoint)
    keeper = ExportKeeper(state)
    keeper.start()
    try:
        done = until(lambda: (one := ask(client, "GET", f"/phinetune/exports/{made['id']}")[1])["finished_at"] and one)
    finally:
        keeper.close()
    assert done["status"] == "succeeded", done["error"]
    assert done["written"]["name"] == "my-shop-abcdef-ckpt-step-2"
    assert not ExportPlaces(state.folder, made["id"]).held.exists()


def test_nothing_is_held_for_a_job_that_is_not_made(served: Served) -> None:
    state, client, checkpoint = served
    jobs = client.fine_tuning.jobs
    with pytest.raises(openai.BadRequestError):
        jobs.create(model=NAME, training_file="file-none")
    (checkpoint / "adapter_model.safetensors").unlink()  # it is being deleted
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        jobs.create(model=NAME, training_file="file-a")
    assert jobs.list().data == []
    assert list((state.folder / "jobs").iterdir()) == []


def test_what_was_held_for_a_job_that_nobody_was_told_of_is_deleted(served: Served) -> None:
    state, client, _ = served
    job = client.fine_tuning.jobs.create(model=NAME, training_file="file-a").id
    JobPlaces(state.folder, "ftjob-nobodys").held.mkdir()
    sweep_held(state)
    assert [place.name for place in (state.folder / "jobs").iterdir()] == [f"{job}.from"]
