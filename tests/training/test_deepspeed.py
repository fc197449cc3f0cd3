"""DeepSpeed by its configuration: what is refused; and where it is installed, that two processes learn the same."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from helpers import TINY
from phinetune.training.deepspeed import wrong_with_deepspeed


def zero(stage: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": stage}}


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package of that name can be found; it is not imported."""
    (tmp_path / "site" / "deepspeed").mkdir(parents=True)
    (tmp_path / "site" / "deepspeed" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path / "site")
    importlib.invalidate_caches()


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("tree", [zero(0), zero(1), zero(2), {"fp16": {"enabled": False}}], ids=str)
def test_stages_that_leave_the_base_whole_are_taken(tmp_path: Path, tree: dict[str, Any]) -> None:
    file = tmp_path / "ds.json"
    file.write_text(json.dumps(tree))
    assert wrong_with_deepspeed(tree, {}) == wrong_with_deepspeed(str(file), {}) == []


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("stage", [3, "auto"])
def test_a_stage_that_spreads_the_base_is_refused_by_name(stage: Any) -> None:
    (told,) = wrong_with_deepspeed(zero(stage), {})
    assert f"zero_optimization.stage: {stage}: stages 0 to 2" in told
    assert "training_config.fsdp: true" in told


@pytest.mark.usefixtures("installed")
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    assert "nowhere.json" in wrong_with_deepspeed(str(tmp_path / "nowhere.json"), {})[0]
    (tmp_path / "broken.json").write_text("{")
    assert "broken.json" in wrong_with_deepspeed(str(tmp_path / "broken.json"), {})[0]


def test_the_wish_of_a_launcher_is_not_passed_over() -> None:
    asked = {"ACCELERATE_USE_DEEPSPEED": "true"}
    assert "`accelerate launch` asks for DeepSpeed" in wrong_with_deepspeed(None, asked)[0]
    assert wrong_with_deepspeed(None, {}) == []


def trained(chats: Path, folder: Path, *options: str, **training: Any) -> list[float]:
    """A run of two processes of the plain engine; the losses that it logged."""
    settings = {"output_dir": str(folder), "max_steps": 4, "per_device_train_batch_size": 2, "learning_rate": 1e-2}
    settings |= {"logging_steps": 1, "save_strategy": "steps", "save_steps": 2, "use_cpu": True, **training}
    tree = {
        "model": {"path": TINY, "device": "cpu", "dtype": "float32"},
        "data": {"train": str(chats), "eval": 0.25},
        "engine": {"kind": "plain"},
        "peft_config": {"r": 4, "lora_alpha": 8},
        "training_config": settings,
        "evaluation": {"max_new_tokens": 4, "max_prompts": 2},
    }
    file = folder.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(tree))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launcher, "-m", "phinetune", "train", str(file), *options],
        env={**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


@pytest.mark.slow
def test_two_processes_learn_what_they_learn_without_it_and_go_on(chats: Path, tmp_path: Path) -> None:
    """ZeRO 2, whose optimizer holds a part of the adapter's state in each process."""
    pytest.importorskip("deepspeed")
    wish = {**zero(2), "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
    wish |= dict.fromkeys(("train_micro_batch_size_per_gpu", "gradient_accumulation_steps"), "auto")
    wanted = trained(chats, tmp_path / "without")
    assert trained(chats, tmp_path / "with", deepspeed=wish) == pytest.approx(wanted, rel=1e-6)
    adapters = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("without", "with")]
    for name, tensor in adapters[0].items():
        torch.testing.assert_close(adapters[1][name], tensor, rtol=1e-5, atol=1e-7)
    shutil.rmtree(tmp_path / "with" / "checkpoint-4")
    assert trained(chats, tmp_path / "with", "--resume", deepspeed=wish) == pytest.approx(wanted, rel=1e-6)
    gone_on = load_file(tmp_path / "with" / "adapter_model.safetensors")
    assert all(torch.equal(tensor, gone_on[name]) for name, tensor in adapters[1].items())
