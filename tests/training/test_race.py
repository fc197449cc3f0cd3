"""A race: its winner is the run with that rate given by hand; whatever stops it, it goes on."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from helpers import tiny_config, train_only
from phinetune.api.train import train_config
from phinetune.api.tune import tune_config
from phinetune.config.run import RunConfig
from phinetune.errors import ConfigError, RunError
from phinetune.training.race_field import Wish


def config_of(chats: Path, folder: Path, **training: Any) -> RunConfig:
    """Twelve steps with dropout, so that random numbers count."""
    config = tiny_config(chats, folder, **{"max_steps": 12, "learning_rate": "race", **training})
    config.peft_config["lora_dropout"] = 0.1
    return config


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return dict(load_file(folder / "adapter_model.safetensors"))


def assert_equal(a: Path, b: Path) -> None:
    one, other = adapter(a), adapter(b)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_winner_of_a_race_is_the_run_with_its_rate_given(chats: Path, tmp_path: Path, console: Console) -> None:
    run = train_config(config_of(chats, tmp_path / "run"), console)
    assert not run.stopped
    assert run.path == tmp_path / "run"
    tree = json.loads((run.path / "tune.json").read_text())
    winner = tree["candidates"][tree["stages"][0]["winner"]]
    assert len(tree["candidates"]) == 3
    losses = {one["number"]: one["losses"]["2"] for one in tree["candidates"]}
    assert winner["number"] == min(losses, key=losses.__getitem__)
    rate = winner["values"]["learning_rate"]
    train_only(config_of(chats, tmp_path / "alone", learning_rate=rate))
    assert_equal(run.path, tmp_path / "alone")
    text = (run.path / "config.yaml").read_text()
    assert text.splitlines()[1].startswith(f"# learning_rate: {rate:g} won a race of 3")
    assert f"learning_rate: {rate}" in text
    assert sorted(one.name for one in (tmp_path / "run-tune").iterdir()) == ["report.html", "study.db", "tune.json"]
    assert "How settings were chosen" in (run.path / "report.html").read_text()
    lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 13)), "no step twice"
    assert "It takes about" in console.file.getvalue()  # type: ignore[attr-defined]
