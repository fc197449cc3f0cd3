"""DPO beside TRL's `DPOTrainer` with PEFT: seconds a pair and memory, in fresh processes, on the same pairs.

    python -m benchmarks.preferences [--pairs 64] [--only ours,trl-best,trl-default]
    python -m benchmarks.preferences --one ours --pairs 16       # one measurement in this process, as JSON

Writes benchmarks/results/preferences/*.json and preferences.md; about 15 minutes for 64 pairs on two quiet cores, most
of it TRL's default. Prompts have about 300 tokens and answers about 100; every prompt is another one. The model is the
starter in bf16, with LoRA of rank 16 on all linear layers. Seconds count the reference's log-probabilities and one
epoch; loading does not count. Memory is resident memory at its largest, loading included. TRL's default has a batch of
8 with gradient checkpointing and runs the reference at every step. Its best setting has the reference computed once and
no checkpointing, at the batch that takes less time on the first pairs (`TRIED`, `SAMPLE`).

`cpu_seconds` are those of the processor, which other programs on the machine hardly change; compare them where the
machine is not quiet, with OMP_NUM_THREADS=1. A measurement in pieces: run each with `--one` and fewer pairs, and
compare the seconds a pair.
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

from rich.console import Console

from benchmarks.machine import machine
from benchmarks.store import HERE, Book, Part, Row

PROMPT, ANSWER = 300, 100  # tokens, about
LORA: dict[str, Any] = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "target_modules": "all-linear"}
TRAINING: dict[str, Any] = {"num_train_epochs": 1, "logging_steps": 1, "save_strategy": "no", "max_length": 1024}
TRAINING["learning_rate"] = 1e-5
KINDS = {
    "ours": "phinetune, batch 8",
    "trl-best": "TRL, reference computed once, no checkpointing",
    "trl-default": "TRL, its default (batch 8, checkpointing)",
}
TRIED, SAMPLE = (1, 8), 16  # batches for TRL's best setting, and how many pairs they are tried on


def pairs(count: int, salt: int = 0, tokens_a_word: float = 1.0) -> list[dict[str, Any]]:
    """Pairs in TRL's form, made of sentences of no meaning.

    Args:
        salt: makes other prompts of the same length, so that a reference kept by an earlier run is not found again.
        tokens_a_word: of the model's tokenizer; the starter's takes about one.
    """
    words = ["the", "of", "and", "to", "in", "is", "you", "that", "it", "he", "was", "for", "on", "are", "as", "with"]

    def text(seed: int, tokens: int) -> str:
        return " ".join(words[(seed * 7 + i * i + i * seed) % len(words)] for i in range(round(tokens / tokens_a_word)))

    return [
        {
            "prompt": [{"role": "user", "content": f"{salt + i}: {text(i, PROMPT)}"}],
            "chosen": [{"role": "assistant", "content": text(1000 + i, ANSWER)}],
            "rejected": [{"role": "assistant", "content": text(2000 + i, ANSWER + i % 9)}],
        }
        for i in range(count)
    ]


def ours(rows: list[dict[str, Any]], batch: int, model: str, device: str) -> dict[str, Any]:
    """This engine, from the loaded model to the end of the epoch."""
    from phinetune.config.run import make_config
    from phinetune.training.prepare import prepare_run, settle
    from phinetune.training.run import open_place, train_run

    folder = Path(tempfile.mkdtemp())
    file = folder / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = make_config(
        {
            "model": {"path": model, "dtype": "bfloat16", "device": device},
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


def trl(rows: list[dict[str, Any]], batch: int, model: str, device: str, *, best: bool) -> dict[str, Any]:
    """TRL's trainer, from its start to the end of the epoch; with the reference where it is computed before."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    from phinetune.checkpoints.starter import ensure_starter

    folder = str(ensure_starter()) if model == "starter" else model
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    placed: dict[str, Any] = {"device_map": {"": 0}} if device == "cuda" else {}
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, attn_implementation="sdpa", **placed)
    args = DPOConfig(
        tempfile.mkdtemp(),
        per_device_train_batch_size=batch,
        gradient_checkpointing=not best,
        precompute_ref_log_probs=best,
        use_cpu=device == "cpu",
        bf16=True,
        report_to=[],
        disable_tqdm=True,
        **TRAINING,
    )
    began, cpu = time.perf_counter(), time.process_time()  # the reference is computed while the trainer is made
    trainer = DPOTrainer(
        loaded,
        args=args,
        train_dataset=Dataset.from_list(rows),
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


def one(
    way: str, count: int, batch: int, model: str = "starter", device: str = "cpu", tokens_a_word: float = 1.0
) -> Row:
    """One measurement in this process. On a CUDA device the memory is the most that torch held there."""
    import torch

    rows = pairs(count, int(time.time()), tokens_a_word)
    given = (rows, batch, model, device)
    made = ours(*given) if way == "ours" else trl(*given, best=way == "trl-best")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    if device == "cuda":
        peak = torch.cuda.max_memory_allocated() / 1e9
    about = {"kind": way, "pairs": count, "batch": batch}
    return {**about, **made, "a_pair": made["seconds"] / count, "peak_gb": peak}


def fresh(kind: str, count: int, batch: int) -> Row:
    """The same in a fresh process; where it fails, a line in place of numbers."""
    options = ["--one", kind, "--pairs", str(count), "--batch", str(batch)]
    command = [sys.executable, "-m", "benchmarks.preferences", *options]
    done = subprocess.run(command, cwd=HERE.parent, capture_output=True, text=True)
    if done.returncode:
        return {"kind": kind, "failed": (done.stderr.strip().splitlines() or ["no message"])[-1]}
    row: Row = json.loads(done.stdout.strip().splitlines()[-1])
    return row


def faster_batch(count: int) -> int:
    """The batch at which TRL's best setting takes less time a pair; both are tried on few pairs."""
    tried = {batch: fresh("trl-best", min(count, SAMPLE), batch) for batch in TRIED}
    return min(tried, key=lambda batch: tried[batch].get("a_pair", float("inf")))


def measured(kinds: list[str], count: int) -> list[Row]:
    """A row a kind. Those of TRL say how many times as long they take as this engine, and how much more memory."""
    rows = []
    for kind in kinds:
        batch = faster_batch(count) if kind == "trl-best" else 8
        more = f", batch {batch}" if kind == "trl-best" else ""
        rows.append({**fresh(kind, count, batch), "what": KINDS[kind] + more})
    own = next((row for row in rows if row["kind"] == "ours" and "a_pair" in row), None)
    for row in rows:
        if own and "a_pair" in row:
            row["times_ours"], row["memory_of_ours"] = (row[name] / own[name] for name in ("a_pair", "peak_gb"))
    return rows


HEADINGS = (
    *("", "seconds a pair", "of it reference", "÷ phinetune's", "peak GB", "÷ its peak"),
    *("first loss", "last loss", "besides"),
)


def cells(row: Row) -> list[str]:
    """A row as the table shows it."""
    if "failed" in row:
        return [row["what"], *[""] * (len(HEADINGS) - 2), row["failed"]]
    return [
        row["what"],
        f"{row['a_pair']:.2f}",
        f"{row['reference_seconds'] / row['pairs']:.2f}",
        f"{row['times_ours']:.1f}" if "times_ours" in row else "",
        f"{row['peak_gb']:.1f}",
        f"{row['memory_of_ours']:.1f}" if "memory_of_ours" in row else "",
        *(f"{row['losses'][place]:.4f}" for place in (0, -1)),
        f"{row['pairs']} pairs, {row['cpu_seconds'] / row['pairs']:.2f} s of a processor a pair",
    ]


def meaning(name: str, part: Part) -> str:
    """What a part of this benchmark is."""
    model = f" The model: {part['model']}." if "model" in part else ""
    return (
        f"DPO on pairs with prompts of about 300 tokens and answers of about 100: one epoch and the reference.{model}"
    )


BOOK = Book("preferences", "Preferences: DPO beside TRL's trainer", HEADINGS, cells, meaning)


def main() -> None:
    """Measure each kind in a fresh process, print the table and write the results."""
    cli = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    cli.add_argument("--pairs", type=int, default=64)
    cli.add_argument("--only", default=",".join(KINDS))
    cli.add_argument("--one", choices=KINDS)
    cli.add_argument("--batch", type=int, default=8)
    given = cli.parse_args()
    if given.one:
        print(json.dumps(one(given.one, given.pairs, given.batch)))
        return
    rows, console = measured(given.only.split(","), given.pairs), Console()
    console.print(BOOK.table("dpo", rows))
    written = BOOK.keep({"dpo": {"machine": machine("bfloat16"), "rows": rows}})
    console.print(f"Wrote {' and '.join(map(str, written))}")


if __name__ == "__main__":
    main()
