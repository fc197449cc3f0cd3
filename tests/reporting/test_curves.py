"""What the plots are given."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from helpers import tiny_config
from phinetune.reporting.curves import Point, charts, thin
from phinetune.reporting.facts import read_run, read_runs
from phinetune.run_folder import RunFolder
from reporting.report_helpers import entry, make_run


def test_every_plot_has_its_points_and_units(tmp_path: Path) -> None:
    made = {chart["key"]: chart for chart in charts([read_run(make_run(tmp_path / "run", steps=30))])}
    wanted = ["loss", "eval_loss", "learning_rate", "grad_norm", "tokens_per_s", "memory", "eval_token_accuracy"]
    assert list(made) == wanted
    assert made["loss"]["series"][0]["x"] == list(range(1, 31))
    assert made["memory"]["series"][0]["y"][0] == float(f"{(1_800_000_000 + 1_000_000) / 2**30:.6g}")
    assert made["eval_token_accuracy"]["series"][0]["y"] == [60.0, 70.0]  # percent


def test_any_number_of_an_evaluation_gets_a_plot(tmp_path: Path) -> None:
    """A training objective may log numbers that the report does not know."""
    folder = make_run(tmp_path / "run", steps=2)
    with (folder / "metrics.jsonl").open("a") as file:
        for step, margin in ((1, 0.25), (2, 0.75)):
            file.write(json.dumps({"step": step, "eval_reward_margin": margin, "eval_runtime": 3.0}) + "\n")
        file.write(json.dumps({"step": 2, "eval_note": "no number"}) + "\n")
    made = {chart["key"]: chart for chart in charts([read_run(folder)])}
    chart = made["eval_reward_margin"]
    assert (chart["title"], chart["unit"]) == ("Held-out reward margin", "")
    assert (chart["series"][0]["x"], chart["series"][0]["y"]) == ([1, 2], [0.25, 0.75])
    assert not {"eval_runtime", "eval_note"} & made.keys()


def test_the_held_out_loss_starts_at_the_base_and_ends_at_the_tuned_model(tmp_path: Path) -> None:
    chart = next(c for c in charts([read_run(make_run(tmp_path / "run"))]) if c["key"] == "eval_loss")
    assert chart["series"][0]["x"] == [0, 10, 20, 30]
    assert chart["series"][0]["y"] == [2.5, 1.0, 0.5, 0.0066]


@pytest.mark.parametrize(
    ("training", "said"),
    [
        ({}, "Not measured during training: set training_config.eval_strategy."),
        ({"eval_strategy": "no"}, "Not measured during training: set training_config.eval_strategy."),
        ({"eval_strategy": "steps"}, "Not measured yet."),
    ],
)
def test_a_plot_without_points_says_why(tmp_path: Path, training: dict[str, str], said: str) -> None:
    RunFolder(tmp_path / "run").start(tiny_config(Path("chats.jsonl"), tmp_path / "run", **training), None)
    made = {chart["key"]: chart for chart in charts([read_run(tmp_path / "run")])}
    assert made["eval_loss"]["series"] == []
    assert made["eval_loss"]["empty"] == said
    assert made["memory"]["empty"] == "Not recorded in this run."


def test_a_number_that_is_not_finite_is_a_gap(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", steps=2)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(entry(3, loss=None, grad_norm=float("nan"), learning_rate="high")) + "\n")
    made = {chart["key"]: chart["series"][0]["y"] for chart in charts([read_run(folder)])}
    assert made["loss"][2] is None
    assert made["grad_norm"][2] is None
    assert made["learning_rate"][2] is None


def test_a_long_curve_is_thinned_and_keeps_its_spikes() -> None:
    points: list[Point] = [(step, float(step % 17)) for step in range(100_000)]
    points[54_321] = (54_321, 99.0)
    points[7] = (7, None)
    kept = thin(points, 1500)
    assert 1000 < len(kept) <= 1500
    assert (54_321, 99.0) in kept
    assert kept[-1] == points[-1]
    assert [step for step, _ in kept] == sorted(step for step, _ in kept)
    assert thin(points[:1500], 1500) == points[:1500]


def test_runs_share_a_plot_and_keep_their_own_steps(tmp_path: Path) -> None:
    runs = read_runs([make_run(tmp_path / "long", steps=30), make_run(tmp_path / "short", steps=4)])
    series = next(chart for chart in charts(runs) if chart["key"] == "loss")["series"]
    assert [(one["name"], one["run"], len(one["x"])) for one in series] == [("long", 0, 30), ("short", 1, 4)]
