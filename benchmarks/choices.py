"""How good the rules' settings and a race's are: six sets, a grid over rate × epochs, held-out loss of each.

    python -m benchmarks.choices [--only arithmetic,json] [--minutes 30] [--model starter]
    python -m benchmarks.choices --seeds 1      # the rules' point and the best of the grid again, another seed
    python -m benchmarks.choices --table        # the table of what is measured

For each set (`benchmarks.choice_sets`): a grid of four rates (the rule's times 1/4, 1/2, 1 and 2) and three numbers of
epochs (the rule's, one and two less, or 1 to 3), and a race of rates. The rule's own choice is a point of the grid.
The winner of a race is to the bit the run with its rate given (tests/training/test_race), so its figure is that
point's.

A run keeps the checkpoint that is best on its own held-out rows, as every user's run does. The figure is the loss of
that checkpoint on fresh rows, by which no checkpoint was chosen. The best of the grid is chosen by them, so it has some
luck that the rules and the race don't have. Another seed (other first weights of the adapter, another order of rows)
tells luck from merit, since it chose nothing. Intervals are of a paired bootstrap over the fresh rows.

Each figure is written to the results file when it is there. A run that was stopped goes on with what is missing, so the
table can be made in pieces (`--minutes`, `--only`, `--out`). The base is loaded once, and the rows of a set are
prepared once.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.choice_sets import HELD_OUT, SETS, Row, parts_of
from benchmarks.machine import machine

RESULTS = Path(__file__).resolve().parent / "results" / "choices.json"
FACTORS = (0.25, 0.5, 1.0, 2.0)
CHOSEN = ("auto", "race")  # figures that name a point of the grid
SEED = ", seed "  # in the name of a point that was measured again
TIMES = 4000  # that rows are drawn for an interval
Figures = dict[str, dict[str, Any]]


@dataclass
class Measured:
    """The figures in the results file."""

    path: Path

    def tree(self) -> dict[str, Any]:
        """All that is measured."""
        return dict(json.loads(self.path.read_text(encoding="utf-8"))) if self.path.is_file() else {"sets": {}}

    def has(self, name: str, key: str) -> bool:
        """Whether a figure of a set is there."""
        return key in self.tree()["sets"].get(name, {})

    def add(self, name: str, key: str, figure: dict[str, Any]) -> None:
        """Keep a figure."""
        tree = self.tree()
        tree["sets"].setdefault(name, {})[key] = figure
        dtype = str(figure.get("dtype", tree.get("machine", {}).get("dtype", "")))
        self.path.write_text(json.dumps({**tree, "machine": machine(dtype)}, indent=1) + "\n", encoding="utf-8")
        print(f"{name}: {key}: { {one: value for one, value in figure.items() if one != 'nll'} }", flush=True)


def config_of(name: str, model: str, folder: Path) -> Any:
    """The run of a set with all settings left to the rules."""
    from phinetune.config.run import make_config

    parts = parts_of(name)
    rows: Mapping[str, list[Row]] = {"train": parts.train, "eval": parts.held_out, "test": parts.fresh}
    files = {key: folder / f"{name}-{key}.jsonl" for key in rows}
    for key, file in files.items():
        file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows[key]), encoding="utf-8")
    return make_config(
        {
            "model": {"path": model},
            "data": {key: str(file) for key, file in files.items()},
            # Evaluations, at most ten a run, whatever share of the time they take.
            "training_config": {"output_dir": str(folder / name), "seed": 0, "metric_for_best_model": "loss"},
            "evaluation": {"enabled": False, "generate": False, "rows_while_training": HELD_OUT},
        }
    )


def measure(name: str, options: argparse.Namespace, base: Any, measured: Measured, late: Callable[[], bool]) -> None:
    """All figures of a set that are missing."""
    from phinetune.training.candidate import candidate
    from phinetune.training.prepare import prepare_rows, settle

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        rows = prepare_rows(settle(config_of(name, options.model, folder)))
        first = candidate(rows, {}, folder / "first")
        rate, epochs = float(first.args.learning_rate), float(first.args.num_train_epochs)
        for times in _epochs(epochs):
            for one in (rate * factor for factor in FACTORS):
                key = key_of(one, times)
                if measured.has(name, key) or late():
                    continue
                values = {"learning_rate": one, "num_train_epochs": float(times)}
                measured.add(name, key, _figure(candidate(rows, values, folder / "run"), base))
                shutil.rmtree(folder / "run")
        measured.add(name, "auto", {"point": key_of(rate, epochs)})
        if not measured.has(name, "race") and not late():
            measured.add(name, "race", _race(name, options.model, folder, rate, round(epochs)))
        figures = measured.tree()["sets"][name]
        for seed, point in itertools.product(options.seeds, [figures["auto"]["point"], best_of(figures)]):
            key = f"{point}{SEED}{seed}"
            if not measured.has(name, key) and not late():
                values = {**values_of(point), "seed": seed}
                measured.add(name, key, _figure(candidate(rows, values, folder / "run"), base))
                shutil.rmtree(folder / "run")


def key_of(rate: float, epochs: float) -> str:
    """The name of a point of the grid."""
    return f"{rate:.3g} x {epochs:g}"


def values_of(point: str) -> dict[str, float]:
    """The settings that the name of a point stands for, the rate rounded as there."""
    rate, epochs = point.split(" x ")
    return {"learning_rate": float(rate), "num_train_epochs": float(epochs)}


def grid_of(figures: Mapping[str, Any]) -> dict[str, Any]:
    """The grid of a set."""
    return {key: one for key, one in figures.items() if key not in CHOSEN and SEED not in key}


def best_of(figures: Mapping[str, Any]) -> str:
    """The name of the best point of the grid."""
    grid = grid_of(figures)
    return min(grid, key=lambda key: float(grid[key]["loss"]))


def _epochs(rule: float) -> list[int]:
    """The rule's epochs, and one and two less; three numbers from 1 on where these are too few."""
    least = max(1, round(rule) - 2)
    return [least, least + 1, least + 2]


def _figure(run: Any, base: Any) -> dict[str, Any]:
    """Train a run, and score the checkpoint that it keeps on the fresh rows."""
    from phinetune.engine.scoring import score_rows
    from phinetune.training.run import open_place, train_run

    began, loaded = time.perf_counter(), base.take(run)
    made = train_run(run, open_place(run.config), loaded=loaded)
    scores = score_rows(made.model, run.chats.test.encoded, None)
    base.give_back(run, loaded, made.model)
    return {
        "loss": sum(one.nll for one in scores) / sum(one.tokens for one in scores),
        "own": _own_loss(made.folder.path),
        "seconds": round(time.perf_counter() - began, 1),
        "dtype": str(run.dtype).removeprefix("torch."),
        "nll": " ".join(f"{one.nll:.4g}" for one in scores),
    }


def _own_loss(folder: Path) -> float:
    """The lowest loss of a run's own evaluations."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return float(min(line["eval_loss"] for line in lines if line.get("eval_loss") is not None))


def _race(name: str, model: str, folder: Path, own: float, epochs: int) -> dict[str, Any]:
    """Which point of the grid a race of the learning rate chooses. `own`: the rule's rate."""
    from phinetune.api.train import train_config
    from phinetune.screen.console import silent

    config, began = config_of(name, model, folder), time.perf_counter()
    config.training_config |= {"learning_rate": "race", "output_dir": str(folder / "raced")}
    run = train_config(config, silent())
    tree = json.loads((run.path / "tune.json").read_text(encoding="utf-8"))
    rate = tree["candidates"][tree["stages"][0]["winner"]]["values"]["learning_rate"]
    seconds = round(time.perf_counter() - began, 1)
    nearest = min((own * factor for factor in FACTORS), key=lambda one: abs(math.log(one / rate)))  # a race rounds
    return {"point": key_of(nearest, epochs), "own": _own_loss(run.path), "seconds": seconds, "why": tree["why"][0]}


def table(tree: Mapping[str, Any]) -> str:
    """The table for the documentation."""
    lines = [
        "| set | best of the grid (rate x epochs) | its loss | auto, above it (95%) | race, above it (95%) "
        "| auto above it with other seeds |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for name, figures in tree["sets"].items():
        grid = grid_of(figures)
        if len(grid) < 12 or not all(key in figures for key in CHOSEN):
            lines.append(f"| {name} | {len(grid)} of 12 points measured | | | | |")
            continue
        named = best_of(figures)
        best, (auto, race) = grid[named], (grid[figures[key]["point"]] for key in CHOSEN)
        again = again_of(figures, figures["auto"]["point"], named)
        lines.append(f"| {name} | {named} | {best['loss']:.4f} | {above(auto, best)} | {above(race, best)} | {again} |")
    return "\n".join(lines)


def again_of(figures: Mapping[str, Any], point: str, best: str) -> str:
    """How far a point's loss lies above the best one's with each other seed that both were measured with."""
    seeds = [key.split(SEED)[1] for key in figures if key.startswith(f"{point}{SEED}")]
    both = [[figures.get(f"{one}{SEED}{seed}") for one in (point, best)] for seed in seeds]
    return ", ".join(f"{float(one['loss']) / float(other['loss']) - 1:+.1%}" for one, other in both if one and other)


def above(one: Mapping[str, Any], best: Mapping[str, Any]) -> str:
    """How far a point's loss lies above the best one's, with the interval of a bootstrap over the fresh rows."""
    change = float(one["loss"]) / float(best["loss"]) - 1
    if one is best:
        return f"{change:+.1%}"
    both = np.array([[float(nll) for nll in point["nll"].split()] for point in (one, best)])
    drawn = np.random.default_rng(0).integers(0, both.shape[1], (TIMES, both.shape[1]))
    mine, theirs = both[:, drawn].sum(-1)
    low, high = np.quantile(mine / theirs - 1, (0.025, 0.975))
    return f"{change:+.1%} ({low:+.1%} to {high:+.1%})"


def main() -> None:
    """Measure what is missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(SETS), help="sets, with commas")
    parser.add_argument("--minutes", type=float, default=1e9, help="begin no run after so long")
    parser.add_argument("--model", default="starter")
    parser.add_argument("--seeds", type=lambda given: [int(one) for one in given.split(",")], default=[])
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
