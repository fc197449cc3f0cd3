"""How the held-out loss falls with the number of training rows: a power law, and what doubling the rows should give.

The law is loss = a + b · rows^-c with b ≥ 0, the form that Hestness et al. 2017 and Kaplan et al. 2020 found over many
orders of magnitude, and Zhang et al. 2024 for fine-tuning. Three or four points don't settle three numbers, so all
exponents are kept that the points allow, weighed by how likely they are, and the noise between two runs is one of the
unknowns.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

Array = NDArray[np.float64]

LEVEL = 90  # of all intervals here, in percent
DRAWS = 2000  # of law and noise together
SEED = 0
EXPONENTS = np.geomspace(0.03, 2.0, 25)
# Before any point is seen. Over many rows exponents are small (Zhang et al. 2024), and where few rows mean few steps
# the loss falls faster. These are our own choice, wide enough for both.
USUAL_EXPONENT, EXPONENT_SPREAD = 0.35, 0.8  # the median, and the spread of its logarithm
# Of a run beside the law, as a share of `_way`. The usual one and its spread are the likeliest for runs of ten sets
# with two seeds, other rows in each share (benchmarks.curve --seeds 0,1).
NOISES = np.geomspace(0.01, 2.0, 18)
USUAL_NOISE, NOISE_SPREAD = 0.25, 0.6
NOISE_ROWS = 48  # on how many it is the usual one
LEAST_WAY = 0.02  # of the loss, also where it is the base's
FEWEST = 3  # points
BAND = 40  # places at which a page draws the law


@dataclass(frozen=True)
class Point:
    """A number of rows that was trained on, and the held-out loss of each row after it.

    Attributes:
        rows: how many were trained on.
        nll, tokens: of each held-out row the summed nats and the labelled tokens, shape (held-out rows).
        units: of each the number of what it is drawn with, shape (held-out rows); None, or one for all: each by
            itself.
    """

    rows: int
    nll: Sequence[float]
    tokens: Sequence[int]
    units: NDArray[np.int64] | None = None

    @property
    def loss(self) -> float:
        """The held-out loss, in nats a labelled token."""
        return float(np.sum(self.nll) / max(1, np.sum(self.tokens)))


@dataclass(frozen=True)
class Forecast:
    """What twice the rows should give.

    Attributes:
        rows: twice the most rows that were trained on.
        gain: how much lower the held-out loss should be than it is now, in nats a token: the median, and the ends of
            the interval (`low`, `high`). It counts the law's uncertainty, other held-out rows, and a run's own noise.
        loss: the loss itself, likewise.
        verdict: gain, nothing or unclear.
        text: in words.
        law: medians of a, b and c.
    """

    rows: int
    gain: float
    low: float
    high: float
    loss: float
    verdict: str
    text: str
    law: tuple[float, float, float]

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "law": list(self.law), "level": LEVEL}


def forecast(points: Sequence[Point], base: float) -> Forecast:
    """What twice the rows of the last point should give.

    Args:
        points: by rising number of rows, at least `FEWEST`, all with the same held-out rows.
        base: the held-out loss before training.
    """
    wanted = 2 * points[-1].rows
    losses, laws = drawn(points, base)
    a, b, c, noise = laws.T
    rng = np.random.default_rng(SEED + 1)
    mean = a + b * float(wanted) ** -c
    then = np.maximum(0.0, mean + noise * _way(mean, base, np.array(float(wanted))) * rng.standard_normal(len(a)))
    gains = losses[:, -1] - then
    low, high = (float(x) for x in np.percentile(gains, [(100 - LEVEL) / 2, (100 + LEVEL) / 2]))
    middle = float(np.median(gains))
    verdict = verdict_of(low, middle, high, points[-1].loss)
    text = words(verdict, wanted, low, high)
    law = (float(np.median(a)), float(np.median(b)), float(np.median(c)))
    return Forecast(wanted, middle, low, high, points[-1].loss - middle, verdict, text, law)


def curve_tree(points: Sequence[Point], base: float) -> dict[str, Any]:
    """What a curve shows, as curve.json holds it.

    Args:
        points, base: see `forecast`.

    Returns:
        `base`; `points`, each with `rows`, `loss` and its interval; `forecast`; `check`, the last doubling as those
            before it would have foretold it, and as it was (None with fewer than four points); `band`, the law between
            the first point and twice the last; `level` of all intervals.
    """
    least, most = points[0].rows, 2 * points[-1].rows
    between = [float(x) for x in np.geomspace(least, most, BAND)]
    return {
        "base": base,
        "points": [{"rows": point.rows, "loss": point.loss, **_ends(point)} for point in points],
        "forecast": forecast(points, base).to_dict(),
        "check": check(points, base) if len(points) > FEWEST else None,
        "band": [
            {"rows": rows, "low": low, "loss": middle, "high": high}
            for rows, (low, middle, high) in zip(between, band(points, base, between), strict=True)
        ],
        "level": LEVEL,
    }


def check(points: Sequence[Point], base: float) -> dict[str, Any]:
    """The gain of the last doubling: what the points before the last one foretell, and what it was."""
    foretold, gain = forecast(points[:-1], base), points[-2].loss - points[-1].loss
    inside = foretold.low <= gain <= foretold.high
    text = (
        "Held against what is known: for the last doubling the runs before it foretold "
        f"{told_span(foretold.low, foretold.high)}, and it gave {abs(gain):.2g} {'less' if gain >= 0 else 'more'}"
        + ("." if inside else ", which lies outside; take the forecast with care.")
    )
    return {"low": foretold.low, "high": foretold.high, "gain": gain, "inside": inside, "text": text}


def _ends(point: Point) -> dict[str, float]:
    """The interval of a point's loss over other held-out rows."""
    losses = _resampled([point], np.random.default_rng(SEED))[:, 0]
    low, high = np.percentile(losses, [(100 - LEVEL) / 2, (100 + LEVEL) / 2])
    return {"low": float(low), "high": float(high)}


def verdict_of(low: float, middle: float, high: float, loss: float) -> str:
    """Whether a gain is likely, none worth more rows is, or neither can be told.

    Nothing: it may be none at all, is most likely below 1% of the loss, and at best 3%.
    """
    if low > 0:
        return "gain"
    return "nothing" if middle < 0.01 * loss and high < 0.03 * loss else "unclear"


def words(verdict: str, rows: int, low: float, high: float) -> str:
    """The forecast in words."""
    lead = f"Doubling the rows to {rows:,}"
    if verdict == "gain":
        return f"{lead} is likely to give {told_span(low, high)} ({LEVEL}% interval)."
    span = told_span(low, high)
    if verdict == "nothing":
        return f"{lead} is likely to give no more than noise: {span} ({LEVEL}% interval)."
    return (
        f"What doubling the rows to {rows:,} gives can't be told: {span} ({LEVEL}% interval). More held-out rows, or "
        "more training rows, would narrow it."
    )


def told_span(low: float, high: float) -> str:
    """A span of gains in words."""
    if low >= 0:
        return f"{low:.2g} to {high:.2g} nats less"
    if high <= 0:
        return f"{-high:.2g} to {-low:.2g} nats more"
    return f"between {-low:.2g} nats more and {high:.2g} less"


def band(points: Sequence[Point], base: float, rows: Sequence[float]) -> list[tuple[float, float, float]]:
    """The law's loss at some numbers of rows, with its interval (low, median, high), a run's own noise left out."""
    _, laws = drawn(points, base)
    a, b, c, _ = laws.T
    found = []
    for number in rows:
        low, middle, high = np.percentile(a + b * number**-c, [(100 - LEVEL) / 2, 50, (100 + LEVEL) / 2])
        found.append((float(low), float(middle), float(high)))
    return found


def drawn(points: Sequence[Point], base: float) -> tuple[Array, Array]:
    """Losses of resampled held-out rows, and a law that each allows.

    Returns:
        the losses, shape (draws, points), and a, b, c and the noise of a run, shape (draws, 4).
    """
    rng = np.random.default_rng(SEED)
    losses = _resampled(points, rng)
    rows = np.array([point.rows for point in points], dtype=np.float64)
    return losses, _laws(rows, losses, _way(np.array([point.loss for point in points]), base, rows), rng)


def _way(loss: Array, base: float, rows: Array) -> Array:
    """What a run's noise is a share of, in nats a token.

    A run has come somewhat further on its way from the base's loss down to nothing than another, or less far. Were the
    way a logistic curve, its slope would be loss · (1 - loss / base): little at either end. Ten sets with two seeds
    differ so: where training took a twentieth of the loss away, runs lie 0.2% of it apart, and 5 to 50% where it took
    nearly all. Which rows were drawn matters less the more there are: as any mean's, by the root of their number.
    """
    return (np.maximum(1 - loss / base, LEAST_WAY) * loss + 1e-9) * np.sqrt(NOISE_ROWS / rows)


def _resampled(points: Sequence[Point], rng: np.random.Generator) -> Array:
    """The loss of every point with held-out rows drawn anew, the same ones for all points. Shape (draws, points)."""
    nll = np.array([point.nll for point in points], dtype=np.float64)
    tokens = np.asarray(points[0].tokens, dtype=np.float64)
    alone, units = np.arange(len(tokens)), points[0].units
    _, own = np.unique(alone if units is None or len(set(units.tolist())) < 2 else units, return_inverse=True)
    count = int(own.max()) + 1
    made = np.empty((DRAWS, len(points)))
    for number in range(DRAWS):
        times = np.bincount(rng.integers(0, count, count), minlength=count)[own].astype(np.float64)
        made[number] = nll @ times / max(1.0, float(times @ tokens))
    return made


def _laws(rows: Array, losses: Array, way: Array, rng: np.random.Generator) -> Array:
    """For each row of `losses` a law, drawn from those that it allows, each as often as it is likely.

    For each exponent c and noise s the law is a straight line in x = rows^-c, so b has a normal distribution about
    weighted least squares, cut off at 0, and a has one about the mean. A point with the way w has the noise s · w. The
    priors on a and on the gain of the last doubling are flat.

    Returns:
        a, b, c and s, shape (draws, 4).
    """
    draws, last = len(losses), float(rows[-1])
    weights = way**-2.0
    total = weights.sum()
    level = losses @ weights / total
    x = (rows / last) ** -EXPONENTS[:, None]  # (exponents, points)
    middle = x @ weights / total
    from_mean = x - middle[:, None]
    spread = from_mean**2 @ weights
    apart = losses - level[:, None]
    slope = apart @ (from_mean * weights).T / spread  # (draws, exponents)
    rest = (apart**2 @ weights)[:, None] - slope**2 * spread
    usual = -0.5 * (np.log(EXPONENTS / USUAL_EXPONENT) / EXPONENT_SPREAD) ** 2
    prior = np.log(x[:, -2] - x[:, -1]) - 0.5 * np.log(spread) + usual
    weight = (
        prior[None, :, None]
        - np.maximum(0.0, rest)[:, :, None] / (2 * NOISES**2)
        + _log_share(slope[:, :, None] * np.sqrt(spread)[:, None] / NOISES)
        - (len(rows) - 2) * np.log(NOISES)
        - 0.5 * (np.log(NOISES / USUAL_NOISE) / NOISE_SPREAD) ** 2
    ).reshape(draws, -1)
    share = np.exp(weight - weight.max(1, keepdims=True)).cumsum(1)
    picked = (share < rng.random((draws, 1)) * share[:, -1:]).sum(1)
    i, j = np.divmod(picked, len(NOISES))
    every = np.arange(draws)
    s, c = NOISES[j], EXPONENTS[i]
    b = _above_zero(slope[every, i], s / np.sqrt(spread[i]), rng.random(draws))
    a = level - b * middle[i] + s / math.sqrt(total) * rng.standard_normal(draws)
    return np.stack([a, b * last**c, c, s], 1)


def _log_share(z: Array) -> Array:
    """log Φ(z), the share of a normal distribution below z."""
    return np.asarray(torch.special.log_ndtr(torch.from_numpy(z)).numpy(), dtype=np.float64)


def _above_zero(mean: Array, error: Array, at: Array) -> Array:
    """The values at the places `at`, from 0 to 1, of normal distributions that are cut off at 0."""
    z = torch.from_numpy(-mean / error)
    below = torch.special.ndtr(z)
    place = below + torch.from_numpy(at) * (1 - below)
    near = mean + error * torch.special.ndtri(place.clamp(1e-12, 1 - 1e-12)).numpy()
    far = -np.log1p(-np.minimum(at, 1 - 1e-12)) * error**2 / np.maximum(np.abs(mean), 1e-300)  # its tail: exponential
    return np.where(z.numpy() > 6, far, np.maximum(0.0, near))
