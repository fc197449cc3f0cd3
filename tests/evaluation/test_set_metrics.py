"""Metrics over the whole set: what they may return, their intervals, and how a failure is told."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from phinetune.config.evaluation import EvaluationSection
from phinetune.errors import ConfigError, RunError
from phinetune.evaluation.bootstrap import SEED
from phinetune.evaluation.metrics import open_metrics
from phinetune.evaluation.set_metrics import PATIENCE, Judged, SetMetric

ANSWERS = ["a", "b", "c", "d", "e", "f", "a", "b"]
REFERENCES = ["a", "b", "c", "x", "e", "y", "a", "z"]


def opened(compute: Any, **options: Any) -> SetMetric:
    (metric,) = open_metrics(EvaluationSection(metrics=[{"name": "own", "compute": compute, **options}])).values()
    assert isinstance(metric, SetMetric)
    return metric


def judged(answers: list[str], references: list[str] = REFERENCES) -> Judged:
    return Judged(answers, references, [[{"role": "user", "content": r}] for r in references])


def share(answers: list[str], references: list[str]) -> float:
    return sum(a == r for a, r in zip(answers, references, strict=True)) / len(answers)


def with_messages(answers: list[str], references: list[str], messages: list[Any]) -> dict[str, float]:
    return {"asked": float(len(messages)), "right": share(answers, references)}


def test_a_number_stands_under_the_metrics_name_and_several_behind_it() -> None:
    assert opened(share)(judged(ANSWERS)) == {"own": 5 / 8}
    assert opened(with_messages)(judged(ANSWERS)) == {"own_asked": 8, "own_right": 5 / 8}


def test_a_file_names_a_function(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("def count(answers, references):\n    answers.clear()\n    return {'of': len(references)}\n")
    metric, given = opened(f"{file}:count"), judged(ANSWERS)
    assert metric(given) == {"own_of": 8}
    assert given.answers == ANSWERS  # the function got lists of its own


def test_the_interval_is_that_of_the_paired_bootstrap() -> None:
    """By hand: the same rows are drawn for both models."""
    base, tuned = judged(["q"] * 4 + ANSWERS[4:]), judged(ANSWERS)
    metric = opened(share, resamples=200)
    before, after = metric(base), metric(tuned)
    made, lines = metric.differences(base, tuned, before, after, 0.0)
    draws = np.random.default_rng(SEED)
    changes = []
    for _ in range(200):
        places = draws.integers(0, 8, 8)
        changes.append(np.mean([(ANSWERS[i] == REFERENCES[i]) - (base.answers[i] == REFERENCES[i]) for i in places]))
    assert lines == []
    assert made["own"].change == pytest.approx(3 / 8)
    assert [made["own"].low, made["own"].high] == pytest.approx(np.percentile(changes, [2.5, 97.5]).tolist())


def test_less_may_be_better_in_some_of_its_numbers() -> None:
    def errors(answers: list[str], references: list[str]) -> dict[str, float]:
        return {"right": 100 * share(answers, references), "wrong": 100 - 100 * share(answers, references)}

    base, tuned = judged(["q"] * 8), judged(REFERENCES)
    metric = opened(errors, less_is_better=["wrong"])
    made, _ = metric.differences(base, tuned, metric(base), metric(tuned), 0.0)
    assert {key: one.verdict for key, one in made.items()} == {"own_right": "better", "own_wrong": "better"}


@pytest.mark.parametrize(
    ("seconds", "calls"), [(0.0, 1000), (PATIENCE / 300, 300), (PATIENCE / 100, 100), (PATIENCE, 0)]
)
def test_a_slow_function_is_called_less_often_and_a_line_says_so(seconds: float, calls: int) -> None:
    made: list[int] = []

    def counted(answers: list[str], references: list[str]) -> float:
        made.append(1)
        return share(answers, references)

    metric, base, tuned = opened(counted), judged(["q"] * 8), judged(ANSWERS)
    differences, lines = metric.differences(base, tuned, {"own": 0.0}, {"own": 5 / 8}, seconds)
    assert len(made) == 2 * calls
    assert bool(differences) == bool(calls)
    assert [("resamples" in line, "`own`" in line) for line in lines] == [(True, True)] * (calls < 1000)


def test_resamples_0_asks_for_no_interval() -> None:
    metric = opened(share, resamples=0)
    assert metric.differences(judged(ANSWERS), judged(ANSWERS), {"own": 1.0}, {"own": 1.0}, 9.0) == ({}, [])


def test_resamples_on_which_it_fails_are_left_out_and_if_they_are_most_there_is_no_interval() -> None:
    def picky(needed: set[str]) -> Any:
        def count(answers: list[str], references: list[str]) -> float:
            return 1 / (needed <= set(references))

        return count

    base, tuned = judged(ANSWERS), judged(ANSWERS)
    often, lines = opened(picky({"a"})).differences(base, tuned, {"own": 1.0}, {"own": 1.0}, 0.0)
    assert often
    assert not lines
    never, lines = opened(picky(set(REFERENCES))).differences(base, tuned, {"own": 1.0}, {"own": 1.0}, 0.0)
    assert not never
    assert lines == ["`own`: no interval, since it fails on more than half of the resamples"]


def raises_on_y(answers: list[str], references: list[str]) -> float:
    if "y" in references:
        raise KeyError("y")
    return 1.0


@pytest.mark.parametrize(
    ("compute", "told"),
    [
        (
            raises_on_y,
            r"`own` failed on 8 answers: KeyError: 'y' \(it also fails on held-out prompt 6 alone, answer 'f'",
        ),
        (lambda answers, references: float("nan"), "`own` gave nan for `own`"),
        (lambda answers, references: {"f1": float("inf")}, "`own` gave inf for `own_f1`"),
        (lambda answers, references: "good", "`own` gave 'good' for `own`; it must give a number"),
        (lambda answers, references: None, "`own` gave None"),
        (lambda answers, references: {}, "`own` gave a dictionary without any number"),
        (lambda answers, references: {"F1 score": 1}, "`own` gave a number called 'own_F1 score'"),
    ],
)
def test_what_cannot_be_used_is_refused_with_its_place(compute: Any, told: str) -> None:
    with pytest.raises(RunError, match=told):
        opened(compute)(judged(ANSWERS))


def test_a_function_of_another_script_is_not_looked_for(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="__main__:compute: a script or a notebook gave this function"):
        opened("__main__:compute")
    with pytest.raises(ConfigError, match="it takes 1 argument; write it as compute"):
        opened(lambda answers: 1.0)


def test_the_search_for_the_row_that_fails_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("phinetune.evaluation.set_metrics.PATIENCE", 0.02)
    calls: list[int] = []

    def slow(answers: list[str], references: list[str]) -> float:
        calls.append(len(answers))
        if len(answers) > 1:
            raise ValueError("too many")
        time.sleep(0.01)
        return 1.0

    with pytest.raises(RunError, match=r"ValueError: too many$"):
        opened(slow)(judged(ANSWERS))
    assert len(calls) < 8
