"""Two processes over gloo train what one does with twice the batch, and only the first prints and writes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from trl import SFTConfig

from helpers import RUN_FILES, tiny_config, train_only, write_jsonl
from phinetune import processes
from phinetune.checkpoints.opened import open_model
from phinetune.config.objective import ObjectiveSection
from phinetune.engine.packing import PackedCollator
from phinetune.training.prepare import prepare_run, settle
from phinetune.training.settings import one_gpu

HERE = Path(__file__).resolve().parent
STEPS = {"max_steps": 3, "logging_steps": 1, "eval_strategy": "steps", "eval_steps": 3}


@dataclass(frozen=True)
class Launched:
    """What two processes left and printed."""

    folder: Path
    out: str
    err: str
    results: list[dict[str, Any]]


def launch(chats: Path, folder: Path, **changes: Any) -> Launched:
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(HERE / "two_processes.py")]
    path = os.pathsep.join([str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, *command, str(chats), str(folder), json.dumps(changes)],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    results = [json.loads((folder.parent / f"results-{rank}.json").read_text()) for rank in (0, 1)]
    return Launched(folder, done.stdout, done.stderr, results)


def alone(chats: Path, folder: Path, engine: str = "fast", **training: Any) -> Path:
    config = tiny_config(chats, folder, **{**STEPS, **training})
    config.model.device, config.model.dtype, config.engine.kind = "cpu", "float32", engine  # type: ignore[assignment]
    train_only(config)
    return folder


def metrics(folder: Path, key: str) -> list[float]:
    entries = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [entry[key] for entry in entries if key in entry]


@pytest.fixture(scope="module")
def chats(rows: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixteen chats: twelve to train on, three steps of four, and four held out, which two processes share unevenly."""
    return write_jsonl(tmp_path_factory.mktemp("data") / "chats.jsonl", [*rows, *rows[:4]])


@pytest.fixture(scope="module", params=["fast", "plain"])
def engine(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def two(engine: str, chats: Path, tmp_path_factory: pytest.TempPathFactory) -> Launched:
    """Two processes with a batch of 1 and two micro-batches a step each."""
    training = {**STEPS, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "save_steps": 3}
    folder = tmp_path_factory.mktemp("two") / "run"
    return launch(chats, folder, training={**training, "save_strategy": "steps"}, engine=engine)


@pytest.fixture(scope="module")
def one(engine: str, chats: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process with a batch of 2 and two micro-batches."""
    folder = tmp_path_factory.mktemp("one") / "run"
    return alone(chats, folder, engine, per_device_train_batch_size=2, gradient_accumulation_steps=2)


def test_two_processes_learn_what_one_learns_from_twice_the_batch(two: Launched, one: Path) -> None:
    ours, wanted = (load_file(folder / "adapter_model.safetensors") for folder in (two.folder, one))
    assert ours.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-5, atol=1e-5, msg=name)


def test_what_is_logged_is_of_all_processes(two: Launched, one: Path) -> None:
    for key in ("loss", "grad_norm", "eval_loss", "eval_token_accuracy"):
        assert metrics(two.folder, key) == pytest.approx(metrics(one, key), rel=1e-5), key
    assert metrics(two.folder, "tokens") == metrics(one, "tokens")


def test_the_first_process_alone_prints_and_writes(two: Launched) -> None:
    assert two.out.count("step 3/3  loss") == 1
    assert two.out.count("LoRA sits on:") == 1
    assert two.out.count("Held-out chats (") == 1
    assert "processes: 2" in two.err
    assert two.err.count("trainable parameters:") == 1
    assert {path.name for path in two.folder.iterdir()} == RUN_FILES | {"checkpoint-3"}


def test_every_process_gets_the_results_that_the_first_one_found(two: Launched) -> None:
    first, second = two.results
    assert first == second
    assert first == json.loads((two.folder / "results.json").read_text())
    assert first["evaluation"]["tuned"]["loss"] > 0


PAIRS = [
    {"prompt": f"How many are {i} and {i}?", "chosen": f"They are {2 * i}.", "rejected": f"No{'!' * (i % 3)} {i}"}
    for i in range(16)
]
DPO = {"kind": "dpo", "loss_type": ["sigmoid", "sft"]}


@pytest.mark.slow
def test_pairs_are_learnt_as_by_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also the part of the loss that is averaged over labels, of which the processes have unlike numbers."""
    pairs = write_jsonl(tmp_path / "pairs.jsonl", PAIRS)
    training = {**STEPS, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    monkeypatch.setenv("PHINETUNE_HOME", str(tmp_path / "two-home"))
    both = launch(pairs, tmp_path / "two", training=training, objective=DPO)
    monkeypatch.setenv("PHINETUNE_HOME", str(tmp_path / "one-home"))
    config = tiny_config(pairs, tmp_path / "one", **{**training, "per_device_train_batch_size": 2})
    config.model.device, config.model.dtype, config.objective = "cpu", "float32", ObjectiveSection(**DPO)
    train_only(config)
    logged = ("rewards/chosen", "rewards/margins", "rewards/accuracies", "logps/chosen", "logps/rejected")
    for key in ("loss", "grad_norm", *logged, "eval_loss", "eval_rewards/margins", "eval_logps/rejected"):
        assert metrics(both.folder, key) == pytest.approx(metrics(tmp_path / "one", key), rel=1e-5), key
    assert both.err.count("the reference's log-probabilities of 12 rows") == 1
    ours, wanted = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("two", "one"))
    for name, tensor in wanted.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.slow
def test_kto_estimates_from_the_answers_of_all_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each process has a group of rows with neighbours of their own; how far the model has moved is one number for all,
    the mean of theirs. The second step again, by hand, from the first one's checkpoint; and the evaluation after it.
    """
    monkeypatch.setenv("PHINETUNE_HOME", str(tmp_path / "home"))
    judged = [{"prompt": row["prompt"], "completion": row["chosen"], "label": i % 3 > 0} for i, row in enumerate(PAIRS)]
    file, folder = write_jsonl(tmp_path / "judged.jsonl", judged), tmp_path / "run"
    training = {"max_steps": 2, "logging_steps": 1, "save_strategy": "steps", "save_steps": 1, "learning_rate": 5e-2}
    training |= {"per_device_train_batch_size": 3, "per_device_eval_batch_size": 2, "lr_scheduler_type": "constant"}
    training |= {"eval_strategy": "steps", "eval_steps": 2, "train_sampling_strategy": "sequential"}
    launch(file, folder, training=training, objective={"kind": "kto"})
    config = tiny_config(file, tmp_path / "again", **training)
    config.model.device, config.model.dtype, config.objective = "cpu", "float32", ObjectiveSection(kind="kto")
    prepared = prepare_run(settle(config))
    kto: Any = prepared.objective

    def groups(chats: Any, size: int, places: Sequence[int]) -> list[tuple[Tensor, ...]]:
        """Of each group of rows: log ratios of own answers and of neighbours', and the labels, after a step."""
        rows = kto.arranged(chats.dataset(), size, None)
        found, collate = [], PackedCollator(share=True, rope_limit=None, owned=True)
        for place in places:
            packed = collate([rows[i] for i in range(place, place + size)])
            with torch.no_grad():
                now = opened.model(**packed).log_probs
                with opened.model.disable_adapter():
                    moved = now - opened.model(**packed).log_probs
            found.append((moved[::2], moved[1::2], torch.tensor([rows[place + i]["label"] > 0.5 for i in range(size)])))
        return found

    def loss(ratios: Tensor, good: Tensor, kl: Tensor) -> Tensor:
        return (1 - torch.sigmoid(0.1 * torch.where(good, ratios - kl, kl - ratios))).sum()

    opened = open_model(folder / "checkpoint-1", dtype="float32", device="cpu")
    second = groups(prepared.chats.train, 3, (6, 9))
    kl = torch.stack([others.mean() for _, others, _ in second]).mean().clamp(min=0)
    assert kl > 0
    assert metrics(folder, "kl") == pytest.approx([0.0, float(kl)], rel=1e-4, abs=1e-6)
    wanted = sum(loss(own, good, kl) for own, _, good in second) / 6
    assert metrics(folder, "loss") == pytest.approx([0.5, float(wanted)], rel=1e-5)
    opened = open_model(folder, dtype="float32", device="cpu")
    held = groups(prepared.chats.held_out, 2, (0, 2))
    kls = [others.mean().clamp(min=0) for _, others, _ in held]
    assert metrics(folder, "eval_kl") == pytest.approx([float(sum(kls)) / 2], rel=1e-4)
    wanted = sum(loss(own, good, kl) for (own, _, good), kl in zip(held, kls, strict=True)) / 4
    assert metrics(folder, "eval_loss") == pytest.approx([float(wanted)], rel=1e-5)


def test_alone_a_process_is_the_main_one() -> None:
    processes.join(cpu=True, timeout_s=1)
    assert processes.is_main()
    assert processes.count() == 1
    assert processes.own_device() is None
    assert not processes.any_of(False)
    assert processes.any_of(True)
    assert processes.from_main({"a": 1}) == {"a": 1}
    assert processes.rank() == 0
    assert processes.summed(torch.ones(2)).tolist() == [1, 1]
    assert float(processes.mean(torch.tensor(3.0))) == 3


def test_one_process_that_sees_several_gpus_takes_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    args = SFTConfig(output_dir=str(tmp_path), use_cpu=True)
    assert one_gpu(args).n_gpu == 0
    assert not [record for record in caplog.records if record.name.startswith("phinetune")]
    args._n_gpu = 4  # what transformers counts where four are visible
    assert one_gpu(args).n_gpu == 1
    assert "accelerate launch --num_processes 4" in caplog.text
