"""A plan's evaluations: as many as transformers' trainer makes."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from helpers import tiny_config, train_only
from phinetune.planning.plan import make_plan
from phinetune.screen.plan import show_plan


@pytest.mark.parametrize(
    "training",
    [
        {"eval_strategy": "no"},
        {"eval_strategy": "steps", "eval_steps": 2},
        {"eval_strategy": "steps", "eval_steps": 2, "eval_delay": 3, "eval_on_start": True},
        {"eval_strategy": "steps", "eval_steps": 0.3},
        {"eval_strategy": "epoch", "max_steps": -1, "num_train_epochs": 2, "per_device_train_batch_size": 5},
        {"eval_strategy": "epoch", "max_steps": -1, "num_train_epochs": 3, "gradient_accumulation_steps": 2,
         "per_device_train_batch_size": 2, "eval_delay": 2},
        {"eval_strategy": "epoch", "max_steps": 7, "per_device_train_batch_size": 4},
    ],
)  # fmt: skip
def test_a_plan_counts_the_evaluations_of_the_run(chats: Path, tmp_path: Path, training: dict[str, Any]) -> None:
    config = tiny_config(chats, tmp_path / "run", **{"save_strategy": "no", **training})
    planned = make_plan(config, probe=False).evaluations
    train_only(config)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert planned.count == sum("eval_loss" in line for line in lines)
    assert planned.seconds is None


def test_what_the_evaluations_take_is_said_apart_from_the_training(chats: Path, tmp_path: Path) -> None:
    made = make_plan(tiny_config(chats, tmp_path / "run", eval_strategy="steps", eval_steps=2))
    looks = made.evaluations
    assert looks.tokens > 0
    assert looks.seconds is not None
    shown = Console(file=io.StringIO(), width=140)
    show_plan(made, shown)
    text = shown.file.getvalue()  # type: ignore[attr-defined]
    scored = (
        f"\nevaluations: {looks.scored} held-out chats are scored {looks.count} times while it trains, about 0:00:0"
    )
    assert scored in text
    assert f"base and tuned on {looks.compared} chats, with {looks.answered} answers of each; not in the time" in text
