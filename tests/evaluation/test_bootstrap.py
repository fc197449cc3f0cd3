"""The interval of a difference: against known cases, and reproducible."""

from __future__ import annotations

import numpy as np
import pytest

from phinetune.evaluation import bootstrap
from phinetune.evaluation.bootstrap import NOT_FINITE, Array, Difference, Pairs, differences
from phinetune.metric_table import MEASURES, Measure

BY_KEY = {measure.key: measure for measure in MEASURES}


def of_means(base: Array, tuned: Array, measure: Measure = BY_KEY["exact_match"]) -> Difference:
    ones = np.ones(len(base))
    return differences({"x": (measure, Pairs(base, tuned, ones, ones))}, len(base))["x"]


def test_the_interval_is_the_normal_one_where_rows_are_many() -> None:
    draw = np.random.default_rng(1)
    base = draw.normal(50, 10, 400)
    tuned = base + draw.normal(3, 8, 400)
    found = of_means(base, tuned)
    gap = tuned - base
    half = 1.96 * gap.std() / 400**0.5
    assert found.change == pytest.approx(gap.mean())
    assert (found.low, found.high) == pytest.approx((gap.mean() - half, gap.mean() + half), abs=0.1)
    assert found.verdict == "better"


def test_it_is_paired() -> None:
    """Rows that differ a lot among themselves, and by exactly one point between the models."""
    base = np.linspace(0, 90, 30)
    found = of_means(base, base + 1)
    assert (found.low, found.high) == pytest.approx((1, 1))


def test_the_same_numbers_come_again(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = np.random.default_rng(2)
    base, tuned = draw.random(50), draw.random(50)
    first = of_means(base, tuned)
    assert of_means(base, tuned) == first
    monkeypatch.setattr(bootstrap, "SEED", 1)
    assert of_means(base, tuned) != first


def test_words_for_better_worse_and_neither() -> None:
    base, tuned = np.zeros(100), np.r_[np.full(31, 100.0), np.zeros(69)]
    better = of_means(base, tuned)
    assert better.text == f"better by 31.0 points, 95% interval {better.low:.1f} to {better.high:.1f}"
    assert 20 < better.low < 31 < better.high < 42
    worse = of_means(tuned, base)
    assert worse.text == f"worse by 31.0 points, 95% interval {-worse.high:.1f} to {-worse.low:.1f}"
    mixed = of_means(np.tile([0.0, 100.0], 20), np.tile([100.0, 0.0], 20))
    assert mixed.verdict == "no clear difference"
    assert mixed.text == f"no clear difference, 95% interval {mixed.low:+.1f} to {mixed.high:+.1f}"


def test_a_loss_that_falls_is_better_and_weighs_tokens() -> None:
    """Two rows of a hundred tokens and one: the mean is over tokens, not over rows."""
    base, tuned, tokens = np.array([200.0, 9.0]), np.array([100.0, 9.0]), np.array([100.0, 1.0])
    pairs = Pairs(base, tuned, tokens, tokens)
    found = differences({"loss": (BY_KEY["loss"], pairs)}, 2)["loss"]
    assert found.change == pytest.approx(109 / 101 - 209 / 101)
    assert found.verdict == "no clear difference"  # a draw of the second row alone has none
    many = Pairs(*(np.tile(one, 50) for one in (base, tuned, tokens, tokens)))
    assert differences({"loss": (BY_KEY["loss"], many)}, 100)["loss"].verdict == "better"
    as_perplexity = Pairs(*(np.tile(one, 50) for one in (base, tuned, tokens, tokens)), exponential=True)
    shown = differences({"p": (BY_KEY["perplexity"], as_perplexity)}, 100)["p"]
    assert shown.change == pytest.approx(np.exp(109 / 101) - np.exp(209 / 101))


def test_rows_that_a_metric_says_nothing_of_do_not_count() -> None:
    there = np.array([1.0, 1.0, 0.0, 1.0])
    found = differences({"x": (BY_KEY["bleu"], Pairs(there * 10, there * 30, there, there))}, 4)["x"]
    assert (found.change, found.rows, found.low, found.high) == pytest.approx((20, 3, 20, 20))


def test_of_one_row_nothing_is_said() -> None:
    one = np.ones(1)
    assert differences({"x": (BY_KEY["bleu"], Pairs(one, one, one, one))}, 1) == {}


def test_many_rows_are_drawn_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bootstrap, "AT_ONCE", 2_000)
    monkeypatch.setattr(bootstrap, "DRAWS", 1_000_000)
    parts = list(bootstrap.resamples(500))
    assert {part.shape[1] for part in parts} == {500}
    assert sum(len(part) for part in parts) == 2_000
    assert all((part.sum(1) == 500).all() for part in parts)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("side", ["base", "tuned"])
@pytest.mark.parametrize("key", ["loss", "token_accuracy", "bleu"])
def test_a_number_that_is_not_finite_is_never_an_unclear_difference(value: float, side: str, key: str) -> None:
    """Not even if most resamples leave its row out."""
    numbers = {"base": np.full(20, 3.0), "tuned": np.full(20, 1.0)}
    numbers[side][7] = value
    found = of_means(numbers["base"], numbers["tuned"], BY_KEY[key])
    assert found.verdict == NOT_FINITE
    assert found.text == "not finite: no difference can be told"


def test_a_perplexity_that_overflows_is_not_finite() -> None:
    pairs = Pairs(np.full(4, 1.0), np.full(4, 800.0), np.ones(4), np.ones(4), exponential=True)
    assert differences({"x": (BY_KEY["perplexity"], pairs)}, 4)["x"].verdict == NOT_FINITE
