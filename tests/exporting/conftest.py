"""Shared by the tests of exports: the starter, tuned on the demo's chats."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from rich.console import Console

from exporting.export_helpers import TunedStarter


@pytest.fixture(scope="session")
def tuned_starter(starter_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> TunedStarter:
    """The starter after enough steps to answer in the demo's form: a friendly line, then JSON."""
    from helpers import read_rows
    from phinetune.api.talk import load
    from phinetune.api.train import train_config
    from phinetune.demo_data.demo_config import demo_config

    torch.set_num_threads(2)
    folder = tmp_path_factory.mktemp("tuned") / "starter"
    settings = ["model.dtype=float32", "peft_config.r=8", "peft_config.lora_alpha=16", "evaluation.enabled=false"]
    settings += ["training_config.max_steps=24", "training_config.save_strategy='no'", "data.eval=null"]
    config = demo_config(folder, settings)
    held_out = str(demo_config(folder).data.eval)
    train_config(config, Console(file=io.StringIO()))
    rows = [row.fields["messages"] for row in read_rows(held_out)][:20]
    return TunedStarter(*load(folder, dtype="float32", device="cpu"), folder, [row[:-1] for row in rows])
