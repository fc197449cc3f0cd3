"""Functions, not fixtures, that tests of several folders use."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from phinetune.config.run import RunConfig, make_config
from phinetune.data.read.any_source import read_first
from phinetune.data.read.row import Row
from phinetune.errors import DataError, at_most
from phinetune.training.prepare import PreparedRun, as_it_began, prepare_run, settle
from phinetune.training.run import RunPlace, TrainedRun, open_place, train_run

# Where the tests behind docs/reference/support.md compute.
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHARED = Path(__file__).resolve().parents[2] / "shared"
TINY = "random:{layers: 2, hidden_size: 32, intermediate_size: 64, heads: 4, kv_heads: 2, vocab: 300}"

# What of a run makes an adapter, and goes to the hub.
ADAPTER_FILES = {
    "README.md",
    "adapter_config.json",
    "adapter_model.safetensors",
    "base.json",
    "chat_template.jinja",
    "config.yaml",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
}
# What a finished run holds besides its checkpoints.
RUN_FILES = ADAPTER_FILES | {
    "manifest.json",
    "metrics.jsonl",
    "report.html",
    "results.json",
    "run.log",
    "samples.jsonl",
    "start.json",
}

# The dictionaries of the guide's model-card sample, key by key.
GUIDE_TRAINING: dict[str, Any] = {
    "bf16": True,
    "do_eval": False,
    "learning_rate": 5.0e-06,
    "log_level": "info",
    "logging_steps": 20,
    "logging_strategy": "steps",
    "lr_scheduler_type": "cosine",
    "num_train_epochs": 1,
    "max_steps": -1,
    "output_dir": "./checkpoint_dir",
    "overwrite_output_dir": True,
    "per_device_eval_batch_size": 4,
    "per_device_train_batch_size": 4,
    "remove_unused_columns": True,
    "save_steps": 100,
    "save_total_limit": 1,
    "seed": 0,
    "gradient_checkpointing": True,
    "gradient_checkpointing_kwargs": {"use_reentrant": False},
    "gradient_accumulation_steps": 1,
    "warmup_ratio": 0.2,
}
GUIDE_PEFT: dict[str, Any] = {
    "r": 16,
    "lora_alpha": 32,
    "lora_dropout": 0.05,
    "bias": "none",
    "task_type": "CAUSAL_LM",
    "target_modules": "all-linear",
    "modules_to_save": None,
}


def chat(question: str, answer: str, *more: str, system: str | None = None) -> dict[str, Any]:
    """A row in OpenAI's form: question, answer, question, answer, …"""
    turns = [
        {"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate((question, answer, *more))
    ]
    return {"messages": ([{"role": "system", "content": system}] if system else []) + turns}


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def tiny_config(chats: Path, output_dir: Path, **training: Any) -> RunConfig:
    """A run of six steps on the tiny model."""
    settings = {
        "output_dir": str(output_dir),
        "max_steps": 6,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 3,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "gradient_checkpointing": False,
        **training,
    }
    return make_config(
        {
            "model": {"path": TINY},
            "data": {"train": str(chats), "eval": 0.25},
            "peft_config": {"r": 4, "lora_alpha": 8},
            "training_config": settings,
            "evaluation": {"max_new_tokens": 6, "max_prompts": 3, "batch_size": 2},
        }
    )


def train_only(
    config: RunConfig, *, resume: bool = False, overwrite: bool = False, changed: bool = False
) -> TrainedRun:
    """A run prepared and trained, nothing shown and nothing compared."""
    place = open_place(config, resume=resume, overwrite=overwrite, changed=changed)
    return train_run(prepared_at(config, place), place)


def prepared_at(config: RunConfig, place: RunPlace) -> PreparedRun:
    """A run as it is prepared for its place: one that goes on takes what it chose when it began."""
    settled = settle(config)
    return prepare_run(*as_it_began(settled, place.folder.read_start())) if place.checkpoint else prepare_run(settled)


def read_rows(source: str, split: str = "train") -> list[Row]:
    """All rows of a source; what is broken in them is raised."""
    rows, broken = read_first(source, split, None)
    if broken:
        raise DataError(at_most(broken))
    return rows


def nf4_checkpoint(folder: Path, family: str, **bits: Any) -> Path:
    """A tiny checkpoint that bitsandbytes quantised and transformers wrote; its embeddings, norms and head in float32.

    Args:
        family: `phi3`, `llama` or `mistral`.
        bits: of transformers' `BitsAndBytesConfig`.
    """
    import torch
    from transformers import BitsAndBytesConfig

    from phinetune.checkpoints.random_shapes import byte_tokenizer
    from phinetune.engine.families import CONFIGS, transformers_class

    sizes = {"vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
    config = CONFIGS[family](**sizes, **heads, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    settings = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, **bits}
    torch.manual_seed(0)
    whole, kind = folder.with_name(f"{folder.name}-whole"), transformers_class(config)
    kind._from_config(config, dtype=torch.float32).save_pretrained(whole)
    quantised = kind.from_pretrained(whole, dtype=torch.float32, quantization_config=BitsAndBytesConfig(**settings))
    quantised.save_pretrained(folder)
    byte_tokenizer(320).save_pretrained(folder)
    return folder
