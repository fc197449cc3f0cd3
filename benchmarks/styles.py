"""The demo of preferences: from two styles of answer to the one that is preferred, and what the answers keep.

    python -m benchmarks.styles [--folder DIR] [--prompts 80] [--set training_config.max_steps=5]

Writes benchmarks/results/styles/*.json and styles.md; about 5 minutes on two quiet cores. Supervised fine-tuning of the
starter on phinetune/demo_data/styles.jsonl teaches a shop's answers, a line and a JSON record, with the line in one of
two styles by chance. DPO on pairs.jsonl then prefers the signed style. Both styles of a pair have the same record, so
the records should stay as right as they were. 80 held-out messages are answered by both models. `--set` goes to both
runs, for a try.
"""

from __future__ import annotations

import time
from pathlib import Path

from rich.console import Console

from benchmarks.demo_runs import main
from benchmarks.store import Book, Part, Row

HEADINGS = ("", "signed %", "record right %", "prefers the signed %", "seconds", "besides")


def cells(row: Row) -> list[str]:
    """A row as the table shows it."""
    shares = [f"{row[name]:.1f}" for name in ("signed", "exact_record", "prefers_chosen")]
    return [row["what"], *shares, f"{row['seconds']:.0f}", row.get("besides", "")]


def meaning(name: str, part: Part) -> str:
    """What a part of this benchmark is."""
    return (
        "The starter after supervised fine-tuning on answers in two styles, and after DPO on pairs that prefer one of "
        "them. Held-out messages: how many answers have the preferred style, and the right JSON record; and how often "
        "the preferred of two given answers is likelier. Seconds are those of the run, its reference counted, without "
        "the comparison at its end."
    )


BOOK = Book("styles", "Preferences: from two styles of answer to one", HEADINGS, cells, meaning)


def measured(folder: Path, prompts: int, settings: list[str], console: Console) -> list[Row]:
    """Both runs, and a row for the model after each."""
    from phinetune.api.train import train_config
    from phinetune.demo_data.demo_config import PREFERENCE, STYLES, demo_config

    first, second = folder / "styles", folder / "preference"
    # The second run compares its start as well.
    taught = train_config(demo_config(first, ["evaluation.enabled=false", *settings], STYLES), console)
    more = [f"model.adapter={first}", f"evaluation.max_prompts={prompts}", *settings]
    began = time.perf_counter()
    preferred = train_config(demo_config(second, more, PREFERENCE), console)
    whole = time.perf_counter() - began
    since, training = preferred.results["since_start"], preferred.results["training"]
    names = ("signed", "exact_record", "prefers_chosen", "stopped", "prompts")
    start, tuned = ({name: since["evaluation"][side][name] for name in names} for side in ("start", "tuned"))
    steps = taught.results["training"]["steps"]
    return [
        {"what": "after sft", **start, "seconds": taught.results["training"]["seconds"], "besides": f"{steps} steps"},
        {
            "what": "after dpo",
            **tuned,
            "seconds": training["seconds"] + training["reference_seconds"],
            "reference_seconds": training["reference_seconds"],
            "with_comparison_seconds": whole,
            "win_rates": {"base": preferred.results["win_rate"], "start": since["win_rate"]},
            "besides": f"{training['steps']} steps; with the comparison {whole:.0f} s; win rate against the starter "
            f"{preferred.results['win_rate']['rate']:.0f}%, against sft {since['win_rate']['rate']:.0f}%",
        },
    ]


if __name__ == "__main__":
    main((__doc__ or "").splitlines()[0], BOOK, "the shop's answers", measured)
