"""Is the difference between two models more than chance? Paired bootstrap over rows (Efron & Tibshirani 1993)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from phinetune.measures import Measure

Array = NDArray[np.float64]

SEED = 0
RESAMPLES = 10_000  # of the rows; fewer where rows are many, but never under FEWEST
FEWEST = 1_000
DRAWS = 50_000_000  # rows drawn in all
AT_ONCE = 2_000_000  # rows drawn at a time: 16 MB
LEVEL = 95


@dataclass(frozen=True)
class Pairs:
    """A measure's numbers row by row, for both models: each is a ratio of sums over rows, a mean where weights are 1.

    Attributes:
        base, tuned: shape (rows), what is summed.
        base_weights, tuned_weights: shape (rows), what is divided by; 0 leaves a row out.
        exponential: whether the measure is the exponential of that ratio, as perplexity is.
    """

    base: Array
    tuned: Array
    base_weights: Array
    tuned_weights: Array
    exponential: bool = False

    def change(self, counts: Array) -> Array:
        """Tuned minus base where each row counts `counts` times, shape (…, rows) to (…)."""
        with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
            base = (counts @ self.base) / (counts @ self.base_weights)
            tuned = (counts @ self.tuned) / (counts @ self.tuned_weights)
            change: Array = np.exp(tuned) - np.exp(base) if self.exponential else tuned - base
        return change


@dataclass(frozen=True)
class Difference:
    """Tuned minus base, and the 95% interval of that difference over other rows of the same kind.

    Attributes:
        verdict: better, worse, or no clear difference where the interval holds zero.
        rows: that count.
    """

    change: float
    low: float
    high: float
    rows: int
    verdict: str
    text: str

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "level": LEVEL}


def differences(pairs: dict[str, tuple[Measure, Pairs]], rows: int) -> dict[str, Difference]:
    """The difference in each measure; the same rows are drawn for all. Nothing can be said of fewer than two rows."""
    if rows < 2 or not pairs:
        return {}
    drawn: dict[str, list[Array]] = {key: [] for key in pairs}
    for counts in _resamples(rows):
        for key, (_, pair) in pairs.items():
            drawn[key].append(pair.change(counts))
    return {key: _difference(measure, pair, np.concatenate(drawn[key])) for key, (measure, pair) in pairs.items()}


def _resamples(rows: int) -> Iterator[Array]:
    """How often each row is drawn, shape (resamples, rows), in parts that fit the memory."""
    generator = np.random.default_rng(SEED)
    left = max(FEWEST, min(RESAMPLES, DRAWS // rows))
    while left > 0:
        size = min(left, max(1, AT_ONCE // rows))
        places = generator.integers(0, rows, (size, rows)) + rows * np.arange(size)[:, None]
        yield np.bincount(places.ravel(), minlength=size * rows).reshape(size, rows).astype(np.float64)
        left -= size


def _difference(measure: Measure, pair: Pairs, drawn: Array) -> Difference:
    counted = int(np.count_nonzero(pair.base_weights + pair.tuned_weights))
    change = float(pair.change(np.ones(len(pair.base))))
    tail = (100 - LEVEL) / 2
    usable = drawn[np.isfinite(drawn)]  # a draw of rows without this measure says nothing
    low, high = np.percentile(usable, [tail, 100 - tail]) if len(usable) else (np.nan, np.nan)
    verdict = _verdict(measure, low, high)
    return Difference(change, float(low), float(high), counted, verdict, _sentence(measure, verdict, change, low, high))


def _verdict(measure: Measure, low: float, high: float) -> str:
    if low > 0 or high < 0:
        return "better" if (low > 0) == measure.more_is_better else "worse"
    return "no clear difference"


def _sentence(measure: Measure, verdict: str, change: float, low: float, high: float) -> str:
    """`better by 31 points, 95% interval 24 to 38`; the interval runs the way the verdict looks."""
    if verdict == "no clear difference":
        ends = f"{measure.amount(low, sign=True)} to {measure.amount(high, sign=True)}"
        return f"{verdict}, {LEVEL}% interval {ends}"
    near, far = sorted((abs(low), abs(high)))
    by = f"{measure.amount(abs(change))}{' points' if measure.percent else ''}"
    return f"{verdict} by {by}, {LEVEL}% interval {measure.amount(near)} to {measure.amount(far)}"
