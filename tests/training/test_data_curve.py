"""The law through a few points: what it foretells is inside its interval as often as it says, and is told in words."""

from __future__ import annotations

import numpy as np
import pytest

from phinetune.training.data_curve import LEVEL, Point, check, curve_tree, drawn, forecast, told_span, verdict_of, words

BASE = 4.0  # the held-out loss before training


def made(rows: int, a: float, b: float, c: float, noise: float, seed: int = 0, held_out: int = 40) -> list[Point]:
    """Four points of a law, with the noise of a run and held-out rows of unlike difficulty.

    Args:
        noise: of a run of 48 rows, as a share of the loss where little of it is left, and of less where little is gone.
    """
    rng = np.random.default_rng(seed)
    tokens, hard = rng.integers(5, 40, held_out), np.exp(rng.normal(0, 0.4, held_out))
    points = []
    for part in (8, 4, 2, 1):
        loss = a + b * (rows // part) ** -c
        loss *= 1 + noise * max(0.0, 1 - loss / BASE) * (48 / (rows // part)) ** 0.5 * rng.normal()
        each = loss * hard / hard.mean() * (1 + 0.05 * rng.normal(size=held_out))
        points.append(Point(rows // part, (each * tokens).tolist(), tokens.tolist()))
    return points


def test_the_last_doubling_lies_in_the_interval_about_as_often_as_that_says() -> None:
    rng, inside, widths = np.random.default_rng(0), 0, []
    for seed in range(30):
        law = (rng.uniform(0.1, 1.5), rng.uniform(0.5, 6), rng.uniform(0.1, 0.8), rng.uniform(0.05, 0.5))
        points = made(int(rng.integers(2000, 20000)), *law, seed=seed)
        found = check(points, BASE)
        inside += found["inside"]
        widths.append((found["high"] - found["low"]) / points[-1].loss)
    assert 24 <= inside <= 30
    assert np.median(widths) < 0.15  # an interval that holds everything would say nothing


def test_a_clear_law_foretells_a_gain_and_a_flat_one_none() -> None:
    clear = forecast(made(40_000, 0.5, 12.0, 0.3, 0.001), BASE)
    true = 12.0 * (40_000**-0.3 - 80_000**-0.3)
    assert clear.low < true < clear.high
    assert clear.low > 0.5 * true
    assert clear.verdict == "gain"
    noisy = forecast(made(40_000, 0.5, 12.0, 0.3, 0.5, seed=1), BASE)
    assert noisy.high - noisy.low > 1.2 * (clear.high - clear.low)
    flat = forecast(made(40_000, 1.0, 0.0, 0.3, 0.001, held_out=400), BASE)
    assert (flat.verdict, flat.low < 0 < flat.high) == ("nothing", True)


def test_a_loss_that_rises_with_the_rows_gives_no_gain_and_no_error() -> None:
    points = [Point(rows, [loss * 10.0] * 30, [10] * 30) for rows, loss in ((10, 1.0), (20, 1.1), (40, 1.2), (80, 1.3))]
    found = forecast(points, BASE)
    assert np.isfinite([found.low, found.gain, found.high]).all()
    assert found.verdict != "gain"
    assert (drawn(points, BASE)[1][:, 1] >= 0).all()


def test_the_same_points_give_the_same_forecast() -> None:
    assert forecast(made(100, 1, 2, 0.3, 0.01), BASE) == forecast(made(100, 1, 2, 0.3, 0.01), BASE)


@pytest.mark.parametrize(
    ("low", "high", "verdict", "said"),
    [
        (0.04, 0.11, "gain", f"likely to give 0.04 to 0.11 nats less ({LEVEL}% interval)"),
        (-0.01, 0.02, "nothing", "no more than noise: between 0.01 nats more and 0.02 less"),
        (-0.03, -0.01, "nothing", "no more than noise: 0.01 to 0.03 nats more"),
        (-0.2, 0.4, "unclear", "can't be told: between 0.2 nats more and 0.4 less"),
    ],
)
def test_the_words(low: float, high: float, verdict: str, said: str) -> None:
    assert verdict_of(low, (low + high) / 2, high, 1.0) == verdict
    assert verdict_of(-0.01, 0.012, 0.029, 1.0) == "unclear"
    assert said in words(verdict, 400, low, high)
    assert told_span(low, high) in words(verdict, 400, low, high)


def test_a_check_that_fails_says_so() -> None:
    points = made(400, 0.5, 6.0, 0.5, 0.001)
    jump = Point(400, [1.5 * nll for nll in points[-1].nll], points[-1].tokens)
    found = curve_tree([*points[:-1], jump], base=BASE)["check"]
    assert not found["inside"]
    assert "lies outside; take the forecast with care" in found["text"]
