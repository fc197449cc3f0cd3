"""Run folders as training leaves them, written by hand: no model, no time."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from helpers import tiny_config
from phinetune.run_folder import RunFolder

ROWS = {"rows": 90, "kept": 80, "cut": 3, "dropped": {"longer than 512 tokens": 10}, "forms": {"messages": 90}}
DATA = {
    "train": {"source": "train.jsonl", **ROWS, "tokens": 9000, "trainable_tokens": 4000, "longest": 158},
    "held_out": {"source": "held.jsonl", **ROWS, "tokens": 8594, "trainable_tokens": 4118, "longest": 149},
}
BASE = {"loss": 2.5, "perplexity": 12.18, "token_accuracy": 46.9, "labelled_tokens": 4118, "prompts": 80}
TUNED = {"loss": 0.0066, "perplexity": 1.01, "token_accuracy": 99.8, "labelled_tokens": 4118, "prompts": 80}
EVALUATION = {
    "base": {**BASE, "rouge_l": 13.5, "chrf": 18.2, "exact_match": 0.0, "stopped": 63.8},
    "tuned": {**TUNED, "rouge_l": 99.5, "chrf": 99.5, "exact_match": 96.25, "stopped": 100.0},
}
DIFFERENCES = {
    "exact_match": {"change": 96.25, "low": 91.25, "high": 100.0, "verdict": "better", "level": 95},
    "chrf": {"change": 81.3, "low": 70.0, "high": 90.0, "verdict": "better", "level": 95},
}

CLASSES = {
    "topic": {
        "labels": ["billing", "delivery", "returns and much else"],
        "sides": {
            side: {
                "matrix": matrix,
                "scores": [
                    {"precision": 50.0, "recall": 100 * row[i] / 20, "f1": 40.0, "support": 20, "answered": 18}
                    for i, row in enumerate(matrix)
                ],
            }
            for side, matrix in {
                "base": [[4, 3, 3, 10], [15, 2, 3, 0], [0, 0, 20, 0]],
                "tuned": [[19, 1, 0, 0], [2, 18, 0, 0], [0, 0, 20, 0]],
            }.items()
        },
    }
}
OWN = {
    "topic_macro_f1": {"less_is_better": False, "is_percent": True},
    "edits": {"less_is_better": True, "is_percent": False},
}
OWN_EVALUATION = {
    "base": {**EVALUATION["base"], "topic_macro_f1": 31.2, "edits": 0.8125},
    "tuned": {**EVALUATION["tuned"], "topic_macro_f1": 95.0, "edits": 0.25},
}


def entry(step: int, scale: float = 1.0, **more: Any) -> dict[str, Any]:
    return {
        "step": step,
        "epoch": step / 20,
        "time": 1_800_000_000.0 + 2 * step,
        "loss": scale * (2.5 * math.exp(-step / 8) + 0.1),
        "grad_norm": scale * 1.5 / step,
        "learning_rate": scale * 1e-3 * (1 - step / 40),
        "tokens": 400 * step,
        "tokens_per_s": scale * (150.0 + step % 5),
        "memory": scale * (1_800_000_000 + step * 1_000_000),
        **more,
    }


def example(number: int = 1, **more: Any) -> dict[str, Any]:
    answers = {"base": f"Dear customer {number}, we are sad.", "tuned": f"Dear customer {number}, we are glad."}
    return {"prompt": f"Question {number}?", "reference": answers["tuned"], "answers": answers, **more}


def make_run(folder: Path, steps: int = 30, finished: bool = True, scale: float = 1.0, **results: Any) -> Path:
    """A run of 30 planned steps with an evaluation at 10 and 20; `scale` multiplies what is plotted, `results`
    replaces keys of results.json.
    """
    run = RunFolder(folder)
    run.start(tiny_config(Path("chats.jsonl"), folder, max_steps=30), None)
    environment = {"device": "cpu", "torch": "2.13.0"}
    facts = {"base": {"path": "starter", "revision": None}, "data": DATA, "trainable_parameters": 4_055_040}
    run.write_start({**facts, "parameters": 138_570_048, "environment": environment, "steps": 30, "process": {}})
    lines = [entry(step, scale) for step in range(1, steps + 1)]
    lines += [
        {"step": s, "eval_loss": scale * 10 / s, "eval_token_accuracy": scale * (0.5 + s / 100)}
        for s in (10, 20)
        if s <= steps
    ]
    run.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    samples = [{"step": step, "prompt": "Two?", "reference": "2", "answer": str(step // 10)} for step in (10, 20)]
    run.samples.write_text("".join(json.dumps(sample) + "\n" for sample in samples if sample["step"] <= steps))
    if finished:
        training = {"steps": steps, "epochs": 1.5, "tokens": 400 * steps, "seconds": 62.0, "tokens_per_s": 150.0}
        examples = [example(i) for i in range(1, 25)]
        whole = {"data": DATA, "training": training, "evaluation": EVALUATION, "examples": examples, **results}
        run.write_results({key: value for key, value in whole.items() if value is not None})
    return folder
