"""Runs with the fast engine are the plain engine's: losses, evaluations, adapters."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from helpers import TINY, chat, tiny_config, train_only, write_jsonl
from phinetune.checkpoints.load import load_base
from phinetune.config.model import ModelSection
from phinetune.config.run import RunConfig
from phinetune.engine.choice import has_packed_form
from phinetune.errors import ConfigError
from phinetune.training.run import TrainedRun

LOGGED = ("loss", "grad_norm", "token_accuracy")


def run(config: RunConfig, kind: str = "fast") -> TrainedRun:
    config.engine.kind = kind  # type: ignore[assignment]
    made = train_only(config)
    assert has_packed_form(made.model) is (kind == "fast")
    return made


def logged(folder: Path, key: str = "loss") -> list[dict[str, Any]]:
    entries = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [entry for entry in entries if key in entry]


def both(
    chats: Path, tmp_path: Path, peft: dict[str, Any] | None = None, loss_on: str = "assistant", **training: Any
) -> dict[str, TrainedRun]:
    """The same run with either engine, in the folders `fast` and `plain`."""
    made = {}
    for kind in ("fast", "plain"):
        config = tiny_config(chats, tmp_path / kind, **training)
        config.peft_config |= peft or {}
        config.data.loss_on = loss_on  # type: ignore[assignment]
        made[kind] = run(config, kind)
    return made


def assert_same_runs(tmp_path: Path, first: float = 1e-4, later: float = 1e-3) -> None:
    fast, plain = logged(tmp_path / "fast"), logged(tmp_path / "plain")
    assert len(fast) == len(plain) > 0
    for i, (ours, theirs) in enumerate(zip(fast, plain, strict=True)):
        for key in LOGGED:
            assert ours[key] == pytest.approx(theirs[key], rel=later if i else first), (i, key)
        assert (ours["tokens"], ours["learning_rate"]) == (theirs["tokens"], theirs["learning_rate"])


@pytest.fixture(scope="module")
def alike(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Chats of unlike length that begin with one system message, which is most of many of them."""
    system = "You count what you are told to count, and you say no more than a number, whatever is asked."
    rows = [chat(f"{i} and {i}? " + "Please. " * (i % 7), f"{2 * i} " * (1 + i % 3), system=system) for i in range(12)]
    return write_jsonl(tmp_path_factory.mktemp("data") / "alike.jsonl", rows)


# -- the same as plain --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "training",
    [
        {},
        {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "num_train_epochs": 2, "max_steps": -1},
        {"lr_scheduler_type": "cosine", "warmup_steps": 2, "max_grad_norm": 0.5, "weight_decay": 0.1},
        {"gradient_checkpointing": True, "train_sampling_strategy": "group_by_length", "max_steps": 3},
        {"remove_unused_columns": True, "dataloader_num_workers": 1, "dataloader_drop_last": True, "max_steps": 2},
    ],
    ids=lambda training: "-".join(training) or "tiny",
)
def test_a_fast_run_logs_what_a_plain_one_does(alike: Path, tmp_path: Path, training: dict[str, Any]) -> None:
    made = both(alike, tmp_path, **training)
    assert_same_runs(tmp_path)
    assert made["fast"].summary["tokens"] == made["plain"].summary["tokens"]


@pytest.mark.parametrize(
    "peft",
    [
        {"use_dora": True},
        {"target_modules": ["qkv_proj"], "layers_to_transform": [1]},
        {"modules_to_save": ["lm_head", "input_layernorm"]},
    ],
    ids=lambda peft: "-".join(peft),
)
def test_a_fast_run_of_another_adapter_logs_what_a_plain_one_does(
    chats: Path, tmp_path: Path, peft: dict[str, Any]
) -> None:
    both(chats, tmp_path, peft, max_steps=3, learning_rate=1e-3)
    assert_same_runs(tmp_path)


def test_labels_in_a_common_beginning_count_for_each_chat(alike: Path, tmp_path: Path) -> None:
    both(
        alike, tmp_path, loss_on="all", gradient_accumulation_steps=2, eval_strategy="steps", eval_steps=2, max_steps=2
    )
    assert_same_runs(tmp_path)
    (ours,), (theirs,) = (logged(tmp_path / kind, "eval_loss") for kind in ("fast", "plain"))
    for key in ("eval_loss", "eval_token_accuracy"):
        assert ours[key] == pytest.approx(theirs[key], rel=1e-4)


def test_an_adapter_on_the_head_is_refused(chats: Path, tmp_path: Path) -> None:
    """A packed row's loss reads the head's weight, so the adapter would be left out and never trained."""
    config = tiny_config(chats, tmp_path / "run", max_steps=1)
    config.peft_config["target_modules"] = ".*(qkv_proj|lm_head)"
    with pytest.raises(ConfigError, match="lm_head"):
        run(config)


def test_evaluations_while_training_are_the_plain_ones(alike: Path, tmp_path: Path) -> None:
    both(alike, tmp_path, eval_strategy="steps", eval_steps=2, eval_on_start=True)
    fast, plain = (logged(tmp_path / kind, "eval_loss") for kind in ("fast", "plain"))
    assert [entry["step"] for entry in fast] == [entry["step"] for entry in plain] == [0, 2, 4, 6]
    for ours, theirs in zip(fast, plain, strict=True):
        for key in ("eval_loss", "eval_perplexity", "eval_token_accuracy"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-4 if ours["step"] == 0 else 1e-3)


def test_what_a_fast_run_saves_is_plain_peft_on_plain_transformers(chats: Path, tmp_path: Path) -> None:
    made = run(tiny_config(chats, tmp_path / "run"))
    base = load_base(ModelSection(path=TINY), fast=False).model
    assert type(base).__module__.startswith("transformers.")
    ids = torch.tensor([made.prepared.chats.train.encoded[0].input_ids])
    with torch.no_grad():
        untrained = base(ids).logits
        theirs = PeftModel.from_pretrained(base, str(tmp_path / "run")).eval()(ids).logits
        torch.testing.assert_close(made.model(ids).logits, theirs, rtol=1e-5, atol=1e-6)
    assert (theirs - untrained).abs().max() > 0.1
    saved = json.loads((tmp_path / "run" / "adapter_config.json").read_text())
    assert "phinetune" not in json.dumps(saved).replace(str(tmp_path), "")


def test_a_fast_run_saves_the_files_and_keys_of_a_plain_one(chats: Path, tmp_path: Path) -> None:
    both(chats, tmp_path, save_strategy="steps", save_steps=3)
    names = [{p.relative_to(tmp_path / kind) for p in (tmp_path / kind).rglob("*")} for kind in ("fast", "plain")]
    assert names[0] == names[1]
    configs = [json.loads((tmp_path / kind / "adapter_config.json").read_text()) for kind in ("fast", "plain")]
    assert configs[0] == configs[1]


# -- what a step counts -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole_step(alike: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the plain engine logs of one step over four chats."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    run(tiny_config(alike, folder, per_device_train_batch_size=4, max_steps=1), "plain")
    return logged(folder)[0]


@pytest.mark.parametrize(
    ("micro", "accumulation", "share"), [(1, 4, True), (2, 2, True), (4, 1, True), (2, 2, False), (4, 1, False)]
)
def test_micro_batches_add_up_to_the_whole_step(
    alike: Path, tmp_path: Path, whole_step: dict[str, Any], micro: int, accumulation: int, share: bool
) -> None:
    config = tiny_config(
        alike,
        tmp_path / "run",
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=accumulation,
        max_steps=1,
    )
    config.engine.share_prefixes = share
    run(config)
    found = logged(tmp_path / "run")[0]
    for key in ("loss", "grad_norm"):
        assert found[key] == pytest.approx(whole_step[key], rel=1e-5)
    assert found["tokens"] == whole_step["tokens"]


def test_a_step_computes_common_beginnings_once_if_it_may(alike: Path, tmp_path: Path) -> None:
    """So that the tests above are about sharing at all."""
    config = tiny_config(alike, tmp_path / "run", max_steps=1)
    for share in (True, False):
        config.engine.share_prefixes = share
        made = train_only(config, overwrite=True)
        engine = made.prepared.engine.fast
        assert engine
        batch = engine.collator(made.model.config)(list(made.prepared.chats.train.dataset())[:4])
        assert (batch["input_ids"].numel() < 0.7 * batch["row_tokens"].item()) is share
        assert made.summary["tokens"] > batch["row_tokens"] / 4


def test_activation_memory_changes_no_loss(chats: Path, tmp_path: Path) -> None:
    losses = []
    for memory in ("none", "all", 1, "auto"):
        config = tiny_config(chats, tmp_path / str(memory), max_steps=3)
        config.peft_config["lora_dropout"] = 0.2
        config.engine.activation_memory = memory  # type: ignore[assignment]
        run(config)
        losses.append([entry["loss"] for entry in logged(tmp_path / str(memory))])
    assert losses[1:] == losses[:1] * 3


def test_rows_filled_by_tokens_train_all_conversations(chats: Path, tmp_path: Path) -> None:
    """Each filled row is as long as max_length at most, and none is cut."""
    config = tiny_config(chats, tmp_path / "run", max_length=200, num_train_epochs=1, max_steps=-1)
    config.data.packing = "tokens"
    config.training_config["per_device_train_batch_size"] = 1
    made = run(config)
    assert made.prepared.engine.fast
    rows: Any = made.prepared.engine.fast.prepare(made.prepared.chats.train.dataset())
    assert max(len(ids) for ids in rows["input_ids"]) <= 200
    assert len(rows) < len(made.prepared.chats.train) == sum(map(len, rows["seq_lengths"]))
    assert made.summary["steps"] == len(rows)
    assert made.summary["tokens"] == made.prepared.chats.train.report.tokens


def test_a_row_filled_with_every_conversation_is_the_step_of_them_all(chats: Path, tmp_path: Path) -> None:
    steps = []
    for name, packing, batch, kind in (("row", "tokens", 1, "fast"), ("batch", "conversations", 9, "plain")):
        config = tiny_config(chats, tmp_path / name, max_length=4096, per_device_train_batch_size=batch, max_steps=1)
        config.data.packing = packing  # type: ignore[assignment]
        made = run(config, kind)
        steps.append(logged(tmp_path / name)[0])
        assert made.summary["tokens"] == made.prepared.chats.train.report.tokens
    for key in LOGGED:
        assert steps[0][key] == pytest.approx(steps[1][key], rel=1e-5)


# -- bfloat16 -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "peft",
    [{}, {"modules_to_save": ["lm_head", "input_layernorm"]}],
    ids=lambda peft: "-".join(peft) or "lora_alone",
)
def test_a_bfloat16_run_stays_near_the_plain_one(chats: Path, tmp_path: Path, peft: dict[str, Any]) -> None:
    made = {}
    for kind in ("fast", "plain"):
        config = tiny_config(chats, tmp_path / kind, max_steps=3, learning_rate=1e-3)
        config.model.dtype = "bfloat16"
        config.peft_config |= peft
        made[kind] = run(config, kind)
    for ours, theirs in zip(logged(tmp_path / "fast"), logged(tmp_path / "plain"), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-2)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=0.1)
    trained = [{n: p.dtype for n, p in m.model.named_parameters() if p.requires_grad} for m in made.values()]
    assert trained[0] == trained[1]


# -- which engine ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [{"neftune_noise_alpha": 5.0}, {"bf16": True}, {"loss_type": "dft"}])
def test_a_run_without_a_fast_form_trains_plainly_and_says_why(
    chats: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, training: dict[str, Any]
) -> None:
    with caplog.at_level(logging.INFO):
        config = tiny_config(chats, tmp_path / "run", max_steps=1, **training)
        config.model.dtype = "float32"
        made = train_only(config)
    assert not has_packed_form(made.model)
    (key,) = training
    said = f"engine: plain (transformers and PEFT as they are): training_config.{key}"
    assert said in caplog.text
    assert said in (tmp_path / "run" / "run.log").read_text()


def test_bf16_alone_means_bfloat16_weights_and_is_fast(chats: Path, tmp_path: Path) -> None:
    made = train_only(tiny_config(chats, tmp_path / "run", max_steps=1, bf16=True))
    assert made.model.dtype == torch.bfloat16
    assert has_packed_form(made.model)
