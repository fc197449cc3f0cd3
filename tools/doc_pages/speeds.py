"""Times a layer of each model of the family on this machine, as `phinetune plan` does, for the page on memory."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.machine import machine

from doc_pages.family import FAMILY, METHODS, RANK, Model
from doc_pages.memory_parts import SPEEDS
from phinetune.config.run import make_config
from phinetune.planning.plan import make_plan

TOKENS = 512  # of a step


def measure_speeds(file: Path = SPEEDS) -> None:
    """Write tokens a second of every model and method to `file`, row by row. Minutes; nothing else should run.

    Raises:
        RuntimeError: other programs took so much of the machine that the times mean nothing; what was written stays.
    """
    facts = machine("bfloat16")
    tree: dict[str, Any] = {key: facts[key] for key in ("processor", "instructions", "threads", "date")} | {"rows": []}
    for model in FAMILY:
        for method in METHODS:
            made = _row(model, method)
            if made["busy"]:
                raise RuntimeError(f"{model.name}, {method}: {made['busy']}")
            tree["rows"].append(made)
            file.write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")


def _row(model: Model, method: str) -> dict[str, Any]:
    """A plan of a run of eight steps of one text each. The tokenizer of a random model takes a byte for a token."""
    with tempfile.TemporaryDirectory() as folder:
        chats = Path(folder) / "chats.jsonl"
        texts = [f"{i} ".ljust(TOKENS - 2, "m") for i in range(8)]
        chats.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        config = make_config(
            {
                "model": {"path": model.path, "dtype": "bfloat16", "quantization": METHODS[method]},
                "data": {"train": str(chats)},
                "peft_config": {"r": RANK, "lora_alpha": 2 * RANK, "target_modules": "all-linear"},
                "training_config": {
                    "output_dir": folder,
                    "max_length": TOKENS,
                    "per_device_train_batch_size": 1,
                    "gradient_accumulation_steps": 1,
                    "num_train_epochs": 1,
                    "learning_rate": 1e-4,
                },
                "engine": {"activation_memory": "all"},
            }
        )
        plan = make_plan(config)
    assert plan.seconds
    return {
        "model": model.name,
        "method": method,
        "tokens_per_s": plan.steps.tokens / plan.seconds,
        "busy": plan.busy,
    }
