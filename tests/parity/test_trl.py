"""The same rows, seed and settings give the losses of TRL with PEFT."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from trl import SFTConfig, SFTTrainer

from helpers import DEVICE, TINY, train_only, write_jsonl
from phinetune.checkpoints.load import load_base
from phinetune.config.model import ModelSection
from phinetune.config.run import make_config

SETTINGS: dict[str, Any] = {
    "learning_rate": 2e-4,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 5,
    "logging_steps": 1,
    "max_steps": 8,
    "save_strategy": "no",
    "gradient_checkpointing": False,
    "bf16": False,
    "seed": 0,
}
LORA = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}

WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
ROWS = [
    {"instruction": f"Say {word} {i} times.", "input": "Please!" if i % 2 else "", "output": " ".join([word] * i)}
    for i, word in enumerate(WORDS, 1)
]


def trl_losses(model: Any, tokenizer: Any, rows: list[dict[str, str]], folder: Path, batch: int) -> list[float]:
    """As shared/baseline/trl_sft.py trains: prompt and completion, all of TRL's own preparation."""
    data = Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": r["instruction"] + ("\n" + r["input"] if r["input"] else "")}],
                "completion": [{"role": "assistant", "content": r["output"]}],
            }
            for r in rows
        ]
    )
    set_seed(SETTINGS["seed"])  # TRL before 1.16 draws the adapter's first weights unseeded
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            str(folder),
            per_device_train_batch_size=batch,
            report_to=[],
            use_cpu=DEVICE == "cpu",
            disable_tqdm=True,
            **SETTINGS,
        ),
        train_dataset=data,
        processing_class=tokenizer,
        peft_config=LoraConfig(**LORA),
    )
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def our_losses(path: str, rows: list[dict[str, str]], folder: Path, batch: int) -> list[float]:
    file = write_jsonl(folder / "rows.jsonl", rows)
    settings = {**SETTINGS, "output_dir": str(folder / "run"), "per_device_train_batch_size": batch}
    config = make_config(
        {
            "model": {"path": path, "dtype": "float32"},
            "data": {"train": str(file)},
            "peft_config": LORA,
            "training_config": settings,
        }
    )
    train_only(config)
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    return [entry["loss"] for entry in map(json.loads, lines) if "loss" in entry]


def assert_same(ours: list[float], theirs: list[float]) -> None:
    assert len(ours) == len(theirs) == 8
    assert ours[0] == pytest.approx(theirs[0], rel=1e-4)
    assert ours[1:] == pytest.approx(theirs[1:], rel=1e-2)


@pytest.mark.parametrize("batch", [1, 3])
def test_tiny_losses_are_those_of_trl(tmp_path: Path, batch: int) -> None:
    loaded = load_base(ModelSection(path=TINY))
    theirs = trl_losses(loaded.model, loaded.tokenizer, ROWS, tmp_path / "trl", batch)
    assert_same(our_losses(TINY, ROWS, tmp_path, batch), theirs)


@pytest.mark.starter
@pytest.mark.slow
def test_the_starters_losses_are_those_of_trl(tmp_path: Path, starter_folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(starter_folder, dtype=torch.float32, attn_implementation="sdpa")
    tokenizer = AutoTokenizer.from_pretrained(starter_folder)
    theirs = trl_losses(model, tokenizer, ROWS, tmp_path / "trl", 2)
    assert_same(our_losses("starter", ROWS, tmp_path, 2), theirs)
