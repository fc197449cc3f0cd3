"""Going on with other steps on the plain engine, with rows drawn by length, and with a best checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from helpers import tiny_config, train_only
from phinetune.config.run import RunConfig


def config_of(chats: Path, folder: Path, kind: str = "fast", **training: Any) -> RunConfig:
    settings = {"num_train_epochs": 2, "max_steps": -1, "per_device_train_batch_size": 1, "save_strategy": "steps"}
    settings |= {"save_steps": 4, "lr_scheduler_type": "constant", "eval_strategy": "no"}
    config = tiny_config(chats, folder, **{**settings, **training})
    config.engine.kind = kind  # type: ignore[assignment]
    config.evaluation.generate, config.evaluation.fixed_prompts = False, 0
    return config


def stop_at_four(config: RunConfig) -> None:
    """A run whose newest checkpoint is that of step 4; nine steps are an epoch."""
    limited = config.model_copy(deep=True)
    limited.training_config["save_total_limit"] = None
    train_only(limited)
    folder = limited.output_dir
    for checkpoint in folder.glob("checkpoint-*"):
        if checkpoint.name != "checkpoint-4":
            for file in checkpoint.iterdir():
                file.unlink()
            checkpoint.rmdir()


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_the_plain_engine_goes_on_at_the_next_row_too(chats: Path, tmp_path: Path) -> None:
    stop_at_four(config_of(chats, tmp_path / "run", "plain"))
    wider = config_of(chats, tmp_path / "run", "plain", per_device_train_batch_size=2)
    made = train_only(wider, resume=True, changed=True)
    tokens = {entry["step"]: entry["tokens"] for entry in metrics(tmp_path / "run")}
    total = made.prepared.chats.train.report.tokens
    assert (tokens[7], tokens[12], made.summary["steps"]) == (total, 2 * total, 12)


def test_rows_that_are_drawn_by_length_begin_their_epoch_again(chats: Path, tmp_path: Path) -> None:
    """Their order follows from the size of a batch, so there is no next row."""
    by_length = {"train_sampling_strategy": "group_by_length"}
    stop_at_four(config_of(chats, tmp_path / "run", **by_length))
    wider = config_of(chats, tmp_path / "run", **by_length, per_device_train_batch_size=3)
    made = train_only(wider, resume=True, changed=True)
    assert made.summary["steps"] == 4 + 3 + 3
    tokens = {entry["step"]: entry["tokens"] for entry in metrics(tmp_path / "run")}
    assert tokens[7] - tokens[4] == made.prepared.chats.train.report.tokens


@pytest.mark.parametrize("changed", [{"metric_for_best_model": "perplexity"}, {"greater_is_better": True}], ids=str)
def test_a_best_evaluation_by_another_measure_is_forgotten(
    chats: Path, tmp_path: Path, changed: dict[str, Any]
) -> None:
    best = {"eval_strategy": "steps", "eval_steps": 4, "load_best_model_at_end": True, "metric_for_best_model": "loss"}
    stop_at_four(config_of(chats, tmp_path / "run", **best))
    made = train_only(config_of(chats, tmp_path / "run", **{**best, **changed}), resume=True, changed=True)
    assert made.summary["best"]["step"] > 4
    assert made.summary["best"]["metric"] == changed.get("metric_for_best_model", "loss")


def test_the_best_checkpoint_without_an_optimizer_is_still_loaded(chats: Path, tmp_path: Path) -> None:
    best = {"eval_strategy": "steps", "eval_steps": 4, "load_best_model_at_end": True, "save_only_model": True}
    made = train_only(config_of(chats, tmp_path / "run", **best, max_steps=8))
    assert made.summary["best"]["loaded"]
    assert not list((tmp_path / "run").glob("checkpoint-*/optimizer.pt"))


def test_ignore_data_skip_begins_the_epoch_again_as_it_says(chats: Path, tmp_path: Path) -> None:
    stop_at_four(config_of(chats, tmp_path / "run", ignore_data_skip=True))
    made = train_only(config_of(chats, tmp_path / "run", ignore_data_skip=True), resume=True)
    tokens = {entry["step"]: entry["tokens"] for entry in metrics(tmp_path / "run")}
    assert tokens[13] - tokens[4] == made.prepared.chats.train.report.tokens
