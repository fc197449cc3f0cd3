"""Jobs of every form of rows, trained by a server; and one whose disk fails in between."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import psutil
import pytest
from openai import OpenAI

from helpers import TINY, chat
from phinetune.config.model import ModelSection
from phinetune.run_folder import RunFolder
from serving.serving_helpers import training_server, until
from serving.test_job_parts import PAIR
from serving.test_serve import lines, process_of

MODELS = {"tiny": ModelSection(path=TINY)}
ENDED = ("succeeded", "failed", "paused")
SHORT = 30_000  # bytes: the log of a job is shorter, the state of its optimizer longer


def created(client: OpenAI, rows: list[Any], **wanted: Any) -> str:
    file = client.files.create(file=("rows.jsonl", lines(rows)), purpose="fine-tune")
    return client.fine_tuning.jobs.create(model="tiny", training_file=file.id, seed=7, **wanted).id


def ended(client: OpenAI, job: str) -> Any:
    return until(lambda: (found := client.fine_tuning.jobs.retrieve(job)).status in ENDED and found)


@pytest.mark.slow
def test_pairs_and_completions_are_trained(tmp_path: Path) -> None:
    hyper = {"n_epochs": 1, "batch_size": 2}
    method: Any = {"type": "dpo", "dpo": {"hyperparameters": {**hyper, "beta": 0.2}}}
    with training_server(tmp_path / "server", MODELS, at_once=1) as client:
        pairs = created(client, [PAIR] * 4, method=method)
        completions = created(
            client, [{"prompt": f"{i} is", "completion": f" {i}."} for i in range(4)], hyperparameters=hyper
        )
        planned = until(lambda: client.fine_tuning.jobs.retrieve(pairs).estimated_finish)
        assert planned >= client.fine_tuning.jobs.retrieve(pairs).created_at
        done = [ended(client, job) for job in (pairs, completions)]
        assert [one.status for one in done] == ["succeeded", "succeeded"], done
        assert done[0].method.dpo.hyperparameters.beta == 0.2
        assert [one.estimated_finish for one in done] == [None, None]
        assert {one.fine_tuned_model for one in done} <= {one.id for one in client.models.list()}
    kinds = [RunFolder(tmp_path / "server" / "runs" / job).read_config().objective.kind for job in (pairs, completions)]
    assert kinds == ["dpo", "sft"]


@pytest.mark.slow
def test_a_job_whose_files_may_not_grow_is_paused_and_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    folder = tmp_path / "server"
    with training_server(folder, MODELS, at_once=1) as client:
        rows = [chat(f"Say {i}", f"It is {i}.") for i in range(48)]
        job = created(client, rows, hyperparameters={"n_epochs": 20, "batch_size": 2})
        until(lambda: client.fine_tuning.jobs.checkpoints.list(job).data)
        psutil.Process((process_of(folder, job) or {})["pid"]).rlimit(psutil.RLIMIT_FSIZE, (SHORT, SHORT))
        assert ended(client, job).status == "paused"
        told = next(one.message for one in client.fine_tuning.jobs.list_events(job) if "paused" in one.message)
        assert "a file would grow past the limit" in told
        assert "Resumed, it goes on from checkpoint-" in told
        client.fine_tuning.jobs.resume(job)
        assert ended(client, job).status == "succeeded"
