"""DPO beside TRL's `DPOTrainer` with PEFT: seconds a pair and memory, in fresh processes, on the same pairs.

    python -m benchmarks.preferences [--pairs 64] [--only ours,trl-best,trl-default]
    python -m benchmarks.preferences --one ours --pairs 16       # one measurement in this process, as JSON

Prompts have about 300 tokens and answers about 100; every prompt is another one. The model is the starter in bf16, with
LoRA of rank 16 on all linear layers. Seconds count the reference's log-probabilities and one epoch; loading does not
count. TRL's default has a batch of 8 with gradient checkpointing and runs the reference at every step. Its best setting
has the reference computed once, a batch of 1, and no checkpointing.

`cpu_seconds` are those of the processor, which other programs on the machine hardly change; compare them where the
machine is not quiet, with OMP_NUM_THREADS=1.

A measurement in pieces: run each with `--one` and fewer pairs, and compare the seconds a pair.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

PROMPT, ANSWER = 300, 100  # tokens, about
LORA: dict[str, Any] = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "target_modules": "all-linear"}
TRAINING: dict[str, Any] = {"num_train_epochs": 1, "logging_steps": 1, "save_strategy": "no", "max_length": 1024}
KINDS = ("ours", "trl-best", "trl-default")
RESULTS = Path(__file__).resolve().parent / "results"


def pairs(count: int, salt: int = 0) -> list[dict[str, Any]]:
    """Pairs in TRL's form, made of sentences of no meaning; about a token a word.

    Args:
        salt: makes other prompts of the same length, so that a reference kept by an earlier run is not found again.
    """
    words = ["the", "of", "and", "to", "in", "is", "you", "that", "it", "he", "was", "for", "on", "are", "as", "with"]

    def text(seed: int, tokens: int) -> str:
        return " ".join(words[(seed * 7 + i * i + i * seed) % len(words)] for i in range(tokens))

    return [
        {
            "prompt": [{"role": "user", "content": f"{salt + i}: {text(i, PROMPT)}"}],
            "chosen": [{"role": "assistant", "content": text(1000 + i, ANSWER)}],
            "rejected": [{"role": "assistant", "content": text(2000 + i, ANSWER + i % 9)}],
        }
        for i in range(count)
    ]


def ours(count: int, batch: int = 8) -> dict[str, Any]:
    """This engine, from the loaded model to the end of the epoch."""
    from phinetune.config.run import make_config
    from phinetune.training.prepare import prepare_run, settle
    from phinetune.training.run import open_place, train_run

    folder = Path(tempfile.mkdtemp())
    file = folder / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in pairs(count, int(time.time()))))
    config = make_config(
        {
            "model": {"path": "starter", "dtype": "bfloat16"},
            "data": {"train": str(file)},
            "objective": "dpo",
            "peft_config": LORA,
            "training_config": {**TRAINING, "output_dir": str(folder / "run"), "per_device_train_batch_size": batch},
        }
    )
    prepared = prepare_run(settle(config))
    place, before = open_place(config), time.process_time()
    made = train_run(prepared, place)
    cpu = time.process_time() - before
    losses = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return {
        "seconds": made.summary["seconds"] + made.summary["reference_seconds"],
        "cpu_seconds": cpu,  # loading counts in it
        "reference_seconds": made.summary["reference_seconds"],
        "tokens": made.summary["tokens"],
        "losses": [entry["loss"] for entry in losses if "loss" in entry],
    }


def trl(count: int, batch: int, *, best: bool) -> dict[str, Any]:
    """TRL's trainer, from its start to the end of the epoch; with the reference where it is computed before."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    from phinetune.checkpoints.starter import ensure_starter

    folder = str(ensure_starter())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, attn_implementation="sdpa")
    args = DPOConfig(
        tempfile.mkdtemp(),
        per_device_train_batch_size=batch,
        gradient_checkpointing=not best,
        precompute_ref_log_probs=best,
        learning_rate=1e-5,
        use_cpu=True,
        bf16=True,
        report_to=[],
        disable_tqdm=True,
        **TRAINING,
    )
    began, cpu = time.perf_counter(), time.process_time()  # the reference is computed while the trainer is made
    trainer = DPOTrainer(
        model,
        args=args,
        train_dataset=Dataset.from_list(pairs(count, int(time.time()))),
        processing_class=tokenizer,
        peft_config=LoraConfig(**LORA, task_type="CAUSAL_LM"),
    )
    made = time.perf_counter()
    cpu = cpu if best else time.process_time()
    trainer.train()
    done = time.perf_counter()
    cpu = time.process_time() - cpu
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    reference = made - began if best else 0.0
    return {"seconds": done - made + reference, "cpu_seconds": cpu, "reference_seconds": reference, "losses": losses}


def one(kind: str, count: int, batch: int | None) -> dict[str, Any]:
    """One measurement in this process."""
    if kind == "ours":
        row = ours(count, batch or 8)
    else:
        best = kind == "trl-best"
        row = trl(count, batch or (1 if best else 8), best=best)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    return {"kind": kind, "pairs": count, **row, "a_pair": row["seconds"] / count, "peak_gb": peak}


def main() -> None:
    """Measure each kind in a fresh process, and write the results."""
    cli = argparse.ArgumentParser()
    cli.add_argument("--pairs", type=int, default=64)
    cli.add_argument("--only", default=",".join(KINDS))
    cli.add_argument("--one", choices=KINDS)
    cli.add_argument("--batch", type=int)
    given = cli.parse_args()
    if given.one:
        print(json.dumps(one(given.one, given.pairs, given.batch)))
        return
    rows = []
    for kind in given.only.split(","):
        command = [sys.executable, "-m", "benchmarks.preferences", "--one", kind, "--pairs", str(given.pairs)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        rows.append(json.loads(done.stdout.strip().splitlines()[-1]))
        print(rows[-1])
    (RESULTS / "preferences.json").write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
