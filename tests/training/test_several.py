"""Runs of four and of two processes, DDP and FSDP2, beside the same runs of one. Two launches hold them all."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from helpers import RUN_FILES, TINY, write_jsonl
from phinetune.api.train import train_config
from phinetune.checkpoints.load import load_base
from phinetune.config.model import ModelSection
from phinetune.screen.console import silent
from training.several_runs import configured

pytestmark = pytest.mark.slow
HERE = Path(__file__).resolve().parent
ADAPTER = "adapter_model.safetensors"
# Three steps of four rows, whoever computes them. The rows are of unlike length, so that dealing them matters.
STEPS = {"max_steps": 3, "logging_steps": 1, "eval_strategy": "steps", "eval_steps": 3, "save_strategy": "steps"}
STEPS |= {"save_steps": 1}
PAIRS = [
    {
        "prompt": f"How many are {i} and {i}?" + " Please." * (i % 4),
        "chosen": f"{2 * i}.",
        "rejected": "No" * (i % 3 + 1),
    }
    for i in range(16)
]
ONE = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
TWO = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
FOUR = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1}
DPO = {"kind": "dpo"}
FSDP = {"fsdp": True}


def launch(count: int, place: Path, runs: list[dict[str, Any]]) -> str:
    """What the processes printed to standard error."""
    file = place / f"runs-{count}.json"
    file.write_text(json.dumps(runs))
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    done = subprocess.run(
        [sys.executable, *command, str(HERE / "several_runs.py"), str(file)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])}
        | {"OMP_NUM_THREADS": "1", "PHINETUNE_HOME": str(place / f"home-{count}")},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


@dataclass(frozen=True)
class Place:
    """Where all runs of these tests lie, with the rows of both objectives, and the base that is quantised."""

    path: Path
    chats: Path
    pairs: Path
    base: Path

    def run(self, name: str, split: dict[str, int], rows: Path | None = None, **more: Any) -> dict[str, Any]:
        training = {**STEPS, **split, **more.pop("training", {})}
        return {"chats": str(rows or self.chats), "folder": str(self.path / name), "training": training, **more}

    def copy(self, name: str, other: str, step: int) -> None:
        """A copy of a run as it was after a step."""
        shutil.copytree(self.path / name, self.path / other)
        for checkpoint in (self.path / other).glob("checkpoint-*"):
            if int(checkpoint.name.split("-")[1]) > step:
                shutil.rmtree(checkpoint)
        (self.path / other / "results.json").unlink()

    def metrics(self, name: str, key: str) -> list[float]:
        lines = (self.path / name / "metrics.jsonl").read_text().splitlines()
        return [entry[key] for entry in map(json.loads, lines) if key in entry]

    def results(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.path / name / "results.json").read_text())
        return found

    def check_alike(self, name: str, wanted: str) -> None:
        """Losses alike to 1e-4 and adapters to 1e-3, both relative; and the same files."""
        for key in ("loss", "grad_norm", "eval_loss"):
            assert self.metrics(name, key) == pytest.approx(self.metrics(wanted, key), rel=1e-4), (name, key)
        ours, theirs = (load_file(self.path / one / ADAPTER) for one in (name, wanted))
        assert ours.keys() == theirs.keys()
        for key, tensor in theirs.items():
            assert float((ours[key] - tensor).norm()) <= 1e-3 * float(tensor.norm()), (name, key)
        assert {file.name for file in (self.path / name).iterdir()} == RUN_FILES | {
            f"checkpoint-{i}" for i in (1, 2, 3)
        }


@pytest.fixture(scope="module")
def place(rows: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Place:
    path = tmp_path_factory.mktemp("several")
    chats = write_jsonl(path / "chats.jsonl", [*rows, *rows[:4]])
    place = Place(path, chats, write_jsonl(path / "pairs.jsonl", PAIRS), path / "base")
    loaded = load_base(ModelSection(path=TINY, device="cpu"))
    loaded.model.save_pretrained(place.base)
    loaded.tokenizer.save_pretrained(place.base)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PHINETUNE_HOME", str(path / "home-1"))
        for run in (
            place.run("one", ONE),
            place.run("one-dpo", ONE, place.pairs, objective=DPO),
            place.run("one-nf4", ONE, quantization="nf4", model=str(place.base)),
            place.run("one-bf16", ONE, dtype="bfloat16"),
        ):
            train_config(configured(run), silent())
    return place


@pytest.fixture(scope="module")
def four(place: Place) -> str:
    runs = [
        place.run("four", FOUR),
        place.run("four-dpo", FOUR, place.pairs, objective=DPO),
        place.run("four-fsdp", FOUR, training=FSDP),
    ]
    return launch(4, place.path, runs)


@pytest.fixture(scope="module")
def two(place: Place, four: str) -> str:
    place.copy("four", "four-two", step=1)
    runs = [
        place.run("four-two", TWO, resume=True),
        place.run("two-fsdp", TWO, training=FSDP),
        place.run("two-fsdp-dpo", TWO, place.pairs, objective=DPO, training=FSDP),
        place.run("two-fsdp-nf4", TWO, quantization="nf4", model=str(place.base), training=FSDP),
        place.run("two-fsdp-plain", TWO, engine="plain", training=FSDP),
        place.run("two-bf16", TWO, dtype="bfloat16"),
        place.run("two-fsdp-bf16", TWO, dtype="bfloat16", training=FSDP),
    ]
    return launch(2, place.path, runs)


@pytest.mark.parametrize(("name", "wanted"), [("four", "one"), ("four-dpo", "one-dpo"), ("four-fsdp", "one")])
def test_four_processes_train_what_one_does(place: Place, four: str, name: str, wanted: str) -> None:
    place.check_alike(name, wanted)


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("two-fsdp", "one"),
        ("two-fsdp-dpo", "one-dpo"),
        ("two-fsdp-nf4", "one-nf4"),
        ("two-fsdp-plain", "one"),
    ],
)
def test_a_base_that_is_spread_trains_the_same(place: Place, two: str, name: str, wanted: str) -> None:
    place.check_alike(name, wanted)


def test_a_run_of_four_goes_on_with_two_and_with_one(place: Place, two: str) -> None:
    """By the same rows, since a step has as many of them; so nothing has to be taken knowingly."""
    place.check_alike("four-two", "one")
    assert "processes.number: the run has 4, the configuration now has 2; what is trained stays the same" in two
    place.copy("four", "four-one", step=2)
    train_config(configured(place.run("four-one", ONE)), silent(), resume=True)
    place.check_alike("four-one", "one")
    assert place.results("four-one")["training"]["steps"] == 3


@pytest.mark.parametrize("name", ["four", "four-fsdp", "two-fsdp-plain"])
def test_all_processes_find_in_an_evaluation_what_one_finds(place: Place, two: str, name: str) -> None:
    ours, wanted = place.results(name), place.results("one")
    for side in ("base", "tuned"):
        assert ours["evaluation"][side] == pytest.approx(wanted["evaluation"][side], rel=1e-4), side
    assert [one["answers"] for one in ours["examples"]] == [one["answers"] for one in wanted["examples"]]
    assert ours["kept"]["results"]["tuned"] == pytest.approx(wanted["kept"]["results"]["tuned"], rel=1e-4)


def test_a_spread_base_says_so_and_is_saved_as_any(place: Place, two: str) -> None:
    told = two.split("two-fsdp\n")[1].split("run ")[0]
    assert "FSDP2: each of 2 processes keeps a part of each decoder layer" in told
    assert "processes: 2" in told
    assert torch.load(place.path / "two-fsdp" / "checkpoint-3" / "optimizer.pt", weights_only=True)["state"]


@pytest.mark.parametrize("name", ["two-bf16", "two-fsdp-bf16"])
def test_a_base_in_bf16_trains_the_same_but_for_its_rounding(place: Place, two: str, name: str) -> None:
    """As near to float32 as one process in bf16 is: rows lie otherwise in a step, so they are rounded otherwise."""
    exact, one, ours = (np.array(place.metrics(run, "loss")) for run in ("one", "one-bf16", name))
    assert np.abs(ours - exact).max() <= 2 * np.abs(one - exact).max()
    exact, one, ours = (
        torch.cat([tensor.flatten() for _, tensor in sorted(load_file(place.path / run / ADAPTER).items())])
        for run in ("one", "one-bf16", name)
    )
    assert not torch.equal(one, exact), "they are rounded at all"
    assert float((ours - exact).norm()) <= 2 * float((one - exact).norm())
