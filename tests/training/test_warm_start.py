"""A run goes on from another run's adapter: with its weights, its shape and its base, and with it as the reference."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch.nn import functional as F

from helpers import TINY, chat, tiny_config, train_only, write_jsonl
from phinetune.api.talk import load
from phinetune.checkpoints.adapters import read_base
from phinetune.checkpoints.load import load_base
from phinetune.config.model import ModelSection
from phinetune.config.run import RunConfig, make_config
from phinetune.data.prepare.encode_answers import parts_of
from phinetune.errors import ConfigError, ModelError, RunError
from phinetune.training.prepare import prepare_run, settle

PAIRS = [
    {"prompt": f"How many are {i} and {i}?", "chosen": f"They are {2 * i}.", "rejected": f"No{'!' * i} {i}"}
    for i in range(8)
]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PHINETUNE_HOME", str(tmp_path / "home"))


def going_on(run: Path, file: Path, folder: Path, kind: str = "dpo", **training: Any) -> RunConfig:
    settings = {"output_dir": str(folder), "max_steps": 2, "per_device_train_batch_size": 4, "logging_steps": 1}
    return make_config(
        {
            "model": {"adapter": str(run), "dtype": "float32"},
            "data": {"train": str(file)},
            "objective": kind,
            "training_config": {**settings, "save_strategy": "no", "learning_rate": 1e-2, **training},
        }
    )


def logged(folder: Path) -> list[dict[str, Any]]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [entry for entry in lines if "loss" in entry]


def chosen_by_peft(run: Path, config: RunConfig) -> float:
    """The mean log-probability of a chosen answer by PEFT's own model of a run."""
    base = load_base(ModelSection(path=TINY), fast=False).model
    model: Any = PeftModel.from_pretrained(base, str(run)).eval()
    sums = []
    for example in prepare_run(settle(config)).chats.train.encoded:
        chosen = parts_of(example)[0]
        ids, labels = torch.tensor([chosen.input_ids]), torch.tensor(chosen.labels[1:])
        with torch.no_grad():
            logits = model(ids).logits[0, :-1].float()
        sums.append(-float(F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")))
    return sum(sums) / len(sums)


def test_the_reference_is_the_adapter_that_the_run_goes_on_from(tiny_run: Path, tmp_path: Path) -> None:
    """Other tools take the bare base, from which the first rewards would not be zero."""
    file = write_jsonl(tmp_path / "pairs.jsonl", PAIRS)
    config = going_on(tiny_run, file, tmp_path / "dpo", per_device_train_batch_size=8)
    train_only(config)
    first, second = logged(tmp_path / "dpo")
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert abs(first["rewards/chosen"]) < 1e-5
    assert first["logps/chosen"] == pytest.approx(chosen_by_peft(tiny_run, config), rel=1e-4)
    assert second["rewards/margins"] > 0.01


def test_sft_goes_on_where_the_other_run_ended(tiny_run: Path, chats: Path, tmp_path: Path) -> None:
    """A step at a rate of zero leaves the adapter as it was; it has the other one's shape and scale."""
    before = load_file(tiny_run / "adapter_model.safetensors")
    config = going_on(tiny_run, chats, tmp_path / "more", "sft", learning_rate=0.0, max_steps=1)
    train_only(config)
    after = load_file(tmp_path / "more" / "adapter_model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    texts = [json.loads((folder / "adapter_config.json").read_text()) for folder in (tiny_run, tmp_path / "more")]
    for key in ("r", "lora_alpha", "bias", "use_rslora"):
        assert texts[0][key] == texts[1][key]
    assert sorted(texts[0]["target_modules"]) == sorted(texts[1]["target_modules"])


def test_where_it_began_is_recorded(tiny_run: Path, chats: Path, tmp_path: Path) -> None:
    folder = tmp_path / "more"
    train_only(going_on(tiny_run, chats, folder, "sft"))
    for file in ("base.json", "start.json"):
        started = json.loads((folder / file).read_text())["started_from"]
        assert started["adapter"] == str(tiny_run.resolve())
        assert len(started["sha256"]) == 64
    base = read_base(folder)
    assert base
    assert base.path == TINY
    model, _ = load(folder)  # and it loads on its base as any other run does
    assert model.peft_config["default"].r == 4


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_a_run_that_went_on_is_resumed_to_the_bit(kind: str, tiny_run: Path, chats: Path, tmp_path: Path) -> None:
    file = chats if kind == "sft" else write_jsonl(tmp_path / "pairs.jsonl", PAIRS)
    train_only(going_on(tiny_run, file, tmp_path / "whole", kind, max_steps=4, lr_scheduler_type="constant"))
    for n, most in enumerate((2, 4)):
        settings = {"max_steps": most, "save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "constant"}
        config = going_on(tiny_run, file, tmp_path / "parts", kind, **settings)
        train_only(config, resume=n > 0, changed=n > 0)
    whole, parts = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("whole", "parts"))
    assert whole == parts


def test_a_run_is_not_resumed_from_another_adapter(tiny_run: Path, chats: Path, tmp_path: Path) -> None:
    settings = {"save_strategy": "steps", "save_steps": 1}
    train_only(going_on(tiny_run, chats, tmp_path / "run", "sft", **settings))
    other = going_on(tiny_run / "checkpoint-2", chats, tmp_path / "run", "sft", **settings)
    with pytest.raises(RunError, match="the adapter that training goes on from: SHA-256"):
        train_only(other, resume=True)


def test_what_does_not_fit_is_refused_before_weights_are_loaded(
    tiny_run: Path, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("phinetune.training.run.load_base", lambda *_, **__: pytest.fail("weights were loaded"))
    config = going_on(tiny_run, chats, tmp_path / "run", "sft")
    config.peft_config = {"r": 8, "use_rslora": True}
    with pytest.raises(ConfigError, match=r"peft_config\.r is 8, and the adapter in .* has 4"):
        train_only(config)
    with pytest.raises(ConfigError, match="would be written over"):
        prepare_run(settle(going_on(tiny_run, chats, tiny_run, "sft")))
    other = going_on(tiny_run, chats, tmp_path / "run", "sft")
    other.model = ModelSection(path=TINY, seed=3, adapter=str(tiny_run))
    with pytest.raises(ModelError, match="was trained on"):
        train_only(other)
    nowhere = going_on(write_jsonl(tmp_path / "x.jsonl", [chat("a", "b")]).parent, chats, tmp_path / "run", "sft")
    nowhere.model.path = TINY
    with pytest.raises(ModelError, match="no adapter there"):
        train_only(nowhere)


def test_what_the_adapter_settles_is_told(tiny_run: Path, chats: Path, tmp_path: Path) -> None:
    config = going_on(tiny_run, chats, tmp_path / "run", "sft")
    config.peft_config = {"use_rslora": True, "lora_dropout": 0.1}
    prepared = prepare_run(settle(config))
    assert prepared.settings.peft["lora_dropout"] == 0.1
    assert not prepared.settings.peft.get("use_rslora")
    assert "peft_config: `use_rslora` has no effect" in "\n".join(prepared.settings.notes)
    assert tiny_config(chats, tmp_path).model.adapter is None
