"""How good the rules' settings and a race's are: six sets, a grid over rate × epochs, held-out loss of each.

    python -m benchmarks.choices [--only arithmetic,json] [--minutes 30] [--model starter]
    python -m benchmarks.choices --table        # the table of what is measured

For each set: a grid of four rates (the rule's times 1/4, 1/2, 1 and 2) and three numbers of epochs (the rule's, a third
less and as many more), the rule's own choice, and a race's. The figure is the lowest held-out loss that a run saw at
its evaluations, which is that of the checkpoint that the run keeps. The base is loaded once, and the rows of
a set are prepared once.

The rows that are made here have answers that can't be told for certain, as people's rows do: somebody's guess, a
synonym. A loss that could fall to nothing would differ by large shares between runs that are all perfect.

Each figure is written to the results file when it is there. A run that was stopped goes on with what is missing, so the
table can be made in pieces (`--minutes`). The rule's choice is a point of the grid by itself.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.machine import machine

RESULTS = Path(__file__).resolve().parent / "results" / "choices.json"
ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "src" / "phinetune" / "demo_data"
ALPACA = ROOT.parent / "shared" / "data" / "alpaca_en_demo.json"
FACTORS = (0.25, 0.5, 1.0, 2.0)
HELD_OUT = 48  # a set; with half as many the best of twelve runs was partly luck
Row = dict[str, Any]


def chat(question: str, answer: str) -> Row:
    """A row in OpenAI's form."""
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def demo(draw: random.Random) -> list[Row]:
    """Answers of a shop: some of the demo's chats."""
    rows = [json.loads(line) for line in (DEMO / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    return draw.sample(rows, 170)


def alpaca(draw: random.Random) -> list[Row]:
    """Instructions with short answers, of ../shared/data."""
    rows = [row for row in json.loads(ALPACA.read_text(encoding="utf-8")) if len(row["output"]) < 300]
    return draw.sample(rows, min(len(rows), 130))


def arithmetic(draw: random.Random) -> list[Row]:
    """Sums and differences of two small numbers, so many that they can be learnt.

    Of 200 rows with numbers up to 99 nothing was learnt but by heart: the less a run trained, the better it did.
    """
    rows = []
    for _ in range(600):
        a, b, plus = draw.randint(2, 30), draw.randint(2, 30), draw.random() < 0.5
        rows.append(chat(f"{a} {'+' if plus else '-'} {b}", f"= {a + b if plus else a - b}"))
    return rows


def classes(draw: random.Random) -> list[Row]:
    """Sorting messages to a helpdesk into four classes, by people who sort one in nine otherwise."""
    kinds = {
        "billing": ["I was charged twice", "The invoice is wrong", "My card was refused", "I want a refund"],
        "login": ["I can't sign in", "My password is not accepted", "The code never comes", "I am locked out"],
        "delivery": ["My parcel is late", "The box was empty", "It went to a neighbour", "Where is my order"],
        "other": ["Do you have a shop in Bern", "Who writes your blog", "Are you hiring", "I like your colours"],
    }
    ends = ["", " since Monday.", ", please help.", " again!", " and nobody answers.", "; what now?", ", as last year."]
    ends += [", I wrote twice.", " (see the picture).", ", thanks."]
    texts = [(f"{text}{end}", kind) for kind, texts in kinds.items() for text in texts for end in ends]
    return [
        chat(text, kind if draw.random() < 6 / 7 else draw.choice(list(kinds)))
        for text, kind in draw.sample(texts, 150)
    ]


def as_json(draw: random.Random) -> list[Row]:
    """Notes of orders as JSON; how urgent one is was somebody's guess."""
    people, things = ["Ana", "Bo", "Cem", "Dina", "Eli"], ["tent", "lamp", "rope", "stove", "boots"]
    rows = []
    for _ in range(150):
        who, what, count, day = draw.choice(people), draw.choice(things), draw.randint(1, 9), draw.randint(1, 28)
        note = f"{who} would like {count} of the {what}, by the {day}th."
        urgency = draw.choices(["low", "normal", "high"], [6, 3, 1] if day > 10 else [1, 3, 6])[0]
        record = {"name": who.lower(), "item": what, "count": count, "day": day, "urgency": urgency}
        rows.append(chat(note, json.dumps(record)))
    return rows


def translation(draw: random.Random) -> list[Row]:
    """Short sentences from English to German, by several translators: most words have two."""
    who = {
        "The child": ["Das Kind", "Das Kleine"],
        "The dog": ["Der Hund"],
        "My sister": ["Meine Schwester"],
        "The baker": ["Der Bäcker", "Der Bäckermeister"],
    }
    does = {
        "sees": ["sieht", "erblickt"],
        "buys": ["kauft", "erwirbt"],
        "paints": ["malt"],
        "loses": ["verliert", "verlegt"],
        "carries": ["trägt"],
        "finds": ["findet", "entdeckt"],
    }
    what = {
        "a red car": ["ein rotes Auto", "einen roten Wagen"],
        "the bread": ["das Brot"],
        "an old book": ["ein altes Buch", "einen alten Band"],
        "a key": ["einen Schlüssel"],
        "the picture": ["das Bild", "das Gemälde"],
    }
    sentences = [(a, b, c) for a in who for b in does for c in what]
    return [
        chat(f"{a} {b} {c}.", f"{draw.choice(who[a])} {draw.choice(does[b])} {draw.choice(what[c])}.")
        for a, b, c in draw.sample(sentences, 110)
    ]


SETS: dict[str, Callable[[random.Random], list[Row]]] = {
    "demo": demo,
    "alpaca": alpaca,
    "arithmetic": arithmetic,
    "classes": classes,
    "json": as_json,
    "translation": translation,
}


@dataclass
class Measured:
    """The figures in the results file."""

    path: Path

    def tree(self) -> dict[str, Any]:
        """All that is measured."""
        return dict(json.loads(self.path.read_text(encoding="utf-8"))) if self.path.is_file() else {"sets": {}}

    def add(self, name: str, key: str, figure: dict[str, Any]) -> None:
        """Keep a figure."""
        tree = self.tree()
        tree.setdefault("sets", {}).setdefault(name, {})[key] = figure
        self.path.write_text(json.dumps({**tree, "machine": machine("bfloat16")}, indent=1) + "\n", encoding="utf-8")


def config_of(name: str, model: str, folder: Path) -> Any:
    """The run of a set with all settings left to the rules."""
    from phinetune.config.run import make_config

    draw = random.Random(name)
    rows = SETS[name](draw)
    draw.shuffle(rows)
    files = {"train": folder / f"{name}-train.jsonl", "eval": folder / f"{name}-eval.jsonl"}
    for file, part in ((files["train"], rows[HELD_OUT:]), (files["eval"], rows[:HELD_OUT])):
        file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in part), encoding="utf-8")
    return make_config(
        {
            "model": {"path": model},
            "data": {key: str(file) for key, file in files.items()},
            # Evaluations, at most ten a run, whatever share of the time they take.
            "training_config": {"output_dir": str(folder / name), "seed": 0, "metric_for_best_model": "loss"},
            "evaluation": {"enabled": False, "generate": False},
        }
    )


def best_loss(folder: Path) -> float:
    """The lowest held-out loss of a run's evaluations."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return float(min(line["eval_loss"] for line in lines if line.get("eval_loss") is not None))


def measure(name: str, options: argparse.Namespace, base: Any, measured: Measured, late: Callable[[], bool]) -> None:
    """All figures of a set that are missing."""
    from phinetune.training.candidate import candidate
    from phinetune.training.prepare import prepare_rows, settle
    from phinetune.training.run import open_place, train_run

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        rows = prepare_rows(settle(config_of(name, options.model, folder)))
        first = candidate(rows, {}, folder / "first")
        rate, epochs = first.args.learning_rate, first.args.num_train_epochs
        points = [(rate * factor, float(times)) for times in _epochs(epochs) for factor in FACTORS]
        for number, (one, times) in enumerate(points):
            key = f"{one:.3g} x {times:g}"
            if key in measured.tree().get("sets", {}).get(name, {}) or late():
                continue
            values = {"learning_rate": one, "num_train_epochs": times}
            run, began = candidate(rows, values, folder / f"run-{number}"), time.perf_counter()
            loaded = base.take(run)
            made = train_run(run, open_place(run.config), loaded=loaded)
            base.give_back(run, loaded, made.model)
            is_auto = one == rate and times == epochs
            figure = {"loss": best_loss(made.folder.path), "seconds": round(time.perf_counter() - began, 1)}
            measured.add(name, key, figure | {"rate": one, "epochs": times, "auto": is_auto})
            print(f"{name}: {key}: {figure}", flush=True)
            shutil.rmtree(made.folder.path)
        if "race" not in measured.tree().get("sets", {}).get(name, {}) and not late():
            measured.add(name, "race", race_of(name, options, folder))


def _epochs(rule: float) -> list[int]:
    """The rule's epochs, a third less and as many more."""
    step = max(1, round(rule / 3))
    return [max(1, round(rule) - step), round(rule), round(rule) + step]


def race_of(name: str, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """A race of the learning rate, and then its winner's run."""
    from phinetune.api.train import train_config
    from phinetune.screen.console import silent

    config, began = config_of(name, options.model, folder), time.perf_counter()
    config.training_config |= {"learning_rate": "race", "output_dir": str(folder / "raced")}
    run = train_config(config, silent())
    tree = json.loads((run.path / "tune.json").read_text(encoding="utf-8"))
    figure = {"loss": best_loss(run.path), "seconds": round(time.perf_counter() - began, 1), "why": tree["why"][0]}
    print(f"{name}: race: {figure}", flush=True)
    return figure


def table(tree: dict[str, Any]) -> str:
    """The table for the documentation."""
    lines = [
        "| set | best of the grid (rate x epochs) | its loss | auto, above it | race, above it |",
        "|---|---|---:|---:|---:|",
    ]
    for name, figures in tree["sets"].items():
        grid = {key: one for key, one in figures.items() if key != "race"}
        if len(grid) < 12 or "race" not in figures:
            lines.append(f"| {name} | {len(grid)} of 12 points measured | | | |")
            continue
        best = min(grid, key=lambda key: float(grid[key]["loss"]))
        loss = grid[best]["loss"]
        auto = next(one["loss"] for one in grid.values() if one["auto"])
        shares = " | ".join(f"{other / loss - 1:+.1%}" for other in (auto, figures["race"]["loss"]))
        lines.append(f"| {name} | {best} | {loss:.4f} | {shares} |")
    return "\n".join(lines)


def main() -> None:
    """Measure what is missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(SETS), help="sets, with commas")
    parser.add_argument("--minutes", type=float, default=1e9, help="begin no run after so long")
    parser.add_argument("--model", default="starter")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    measured, began = Measured(options.out), time.monotonic()
    if not options.table:
        from phinetune.logs import quiet_libraries
        from phinetune.training.candidate import SharedBase

        quiet_libraries()
        base = SharedBase()
        for name in options.only.split(","):
            measure(name, options, base, measured, lambda: time.monotonic() - began > 60 * options.minutes)
    print(table(measured.tree()))


if __name__ == "__main__":
    main()
