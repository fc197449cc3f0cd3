"""What the demo's task costs of all else, without and with replay: 3 epochs over all its rows.

    python -m benchmarks.forgetting [--folder DIR] [--prompts 80] [--set training_config.max_steps=5]

Writes benchmarks/results/forgetting/*.json and forgetting.md; about a quarter of an hour on two quiet cores. Both runs
have the demo's settings, but for the epochs. The second one has `data.replay: 0.1`: one answer of the base itself, to a
neutral prompt, for ten rows. The bar: the loss on neutral chats rises at most half as much with it, and exact match
lies within the interval of the run without.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.demo_runs import main
from benchmarks.store import Book, Part, Row

HEADINGS = ("", "neutral loss", "rises by (95%)", "exact match % (95%)", "seconds", "besides")
REPLAY = {"without replay": 0.0, "with replay 0.1": 0.1}


def cells(row: Row) -> list[str]:
    """A row as the table shows it."""
    rise, exact = (f"{row[name]:{form}} ({row[name + '_low']:{form}} to {row[name + '_high']:{form}})"
                   for name, form in (("rise", ".3f"), ("exact", ".1f")))  # fmt: skip
    return [row["what"], f"{row['loss']:.3f}", rise, exact, f"{row['seconds']:.0f}", row["besides"]]


def meaning(name: str, part: Part) -> str:
    """What a part of this benchmark is."""
    return (
        "The starter after 3 epochs of the demo's rows. Neutral loss: nats a token on the neutral chats that come with "
        f"phinetune; the base has {part['rows'][0]['base']:.3f}. Exact match: of the demo's held-out prompts; the base "
        f"has {part['rows'][0]['base_exact']:.1f}. Seconds are those of the training."
    )


BOOK = Book("forgetting", "What is forgotten, without and with replay", HEADINGS, cells, meaning)


def measured(folder: Path, prompts: int, settings: list[str], console: Console) -> list[Row]:
    """Both runs, a row for each."""
    from phinetune.api.train import train_config
    from phinetune.demo_data.demo_config import demo_config

    rows = []
    for number, (what, replay) in enumerate(REPLAY.items()):
        more = ["training_config.max_steps=-1", "training_config.num_train_epochs=3", f"data.replay={replay}"]
        config = demo_config(folder / str(number), [*more, f"evaluation.max_prompts={prompts}", *settings])
        rows.append({"what": what, **numbers(train_config(config, console).results)})
    return rows


def numbers(results: dict[str, Any]) -> Row:
    """What the table takes of a run's results."""
    kept, exact, training = results["kept"], results["differences"]["exact_match"], results["training"]
    rise = kept["differences"]["loss"]
    before = results["evaluation"]["base"]["exact_match"]
    return {
        "base": kept["results"]["base"]["loss"],
        "loss": kept["results"]["tuned"]["loss"],
        **dict(zip(("rise", "rise_low", "rise_high"), (rise[key] for key in ("change", "low", "high")), strict=True)),
        "exact": results["evaluation"]["tuned"]["exact_match"],
        "base_exact": before,
        "exact_low": before + exact["low"],
        "exact_high": before + exact["high"],
        "neutral_rows": kept["rows"],
        "seconds": training["seconds"],
        "besides": f"{training['steps']} steps; {kept['rows']} neutral chats",
    }


if __name__ == "__main__":
    main((__doc__ or "").splitlines()[0], BOOK, "the demo", measured)
