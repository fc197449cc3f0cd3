"""Is the difference between two models more than chance?

The answer comes from a paired bootstrap over the rows (Efron & Tibshirani 1993).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from phinetune.metric_table import Measure

Array = NDArray[np.float64]
Units = NDArray[np.int64]  # of each row the number of what it is drawn with

SEED = 0
RESAMPLES = 10_000  # how often the rows are resampled
MIN_RESAMPLES = 1_000  # the same, if there are so many rows that DRAWS would be exceeded
DRAWS = 50_000_000  # rows that are drawn in all resamples together
AT_ONCE = 2_000_000  # rows that are drawn at a time: 16 MB
LEVEL = 95  # of the interval, in percent
NOT_FINITE = "not finite"  # the verdict where one of the models has no finite number


@dataclass(frozen=True)
class Pairs:
    """A measure's numbers for each row, for both models.

    A model's measure is the sum of its numbers over the rows, divided by the sum of its weights. If all weights are 1,
    that is the mean.

    Attributes:
        base, tuned: the numbers, shape (rows).
        base_weights, tuned_weights: the weights, shape (rows). A row with weight 0 does not count.
        exponential: whether the measure is the exponential of that quotient, as perplexity is.
    """

    base: Array
    tuned: Array
    base_weights: Array
    tuned_weights: Array
    exponential: bool = False

    def change(self, counts: Array) -> Array:
        """Tuned minus base, if each row counts as often as `counts` says.

        Args:
            counts: shape (…, rows).

        Returns:
            shape (…).
        """
        with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
            base = (counts @ self.base) / (counts @ self.base_weights)
            tuned = (counts @ self.tuned) / (counts @ self.tuned_weights)
            change: Array = np.exp(tuned) - np.exp(base) if self.exponential else tuned - base
        return change


@dataclass(frozen=True)
class Difference:
    """The difference between tuned and base, with its 95% interval over other rows of the same kind.

    Attributes:
        change: tuned minus base.
        low, high: the ends of the interval. They are nan if no resample has a value.
        rows: how many rows count.
        verdict: better, worse, or no clear difference if the interval contains zero; `NOT_FINITE` if a number of one
            of the models is not finite.
        text: verdict and numbers in one line.
    """

    change: float
    low: float
    high: float
    rows: int
    verdict: str
    text: str

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "level": LEVEL}


def differences(
    pairs: dict[str, tuple[Measure, Pairs]], rows: int, units: Units | None = None
) -> dict[str, Difference]:
    """The difference in each measure. All measures use the same resamples.

    Args:
        pairs: the measures and their numbers, by key.
        rows: how many rows there are.
        units: see `resamples`.

    Returns:
        the differences by key; empty if there are fewer than two rows, or units.
    """
    if not pairs or drawn_at_a_time(rows, units) < 2:
        return {}
    drawn: dict[str, list[Array]] = {key: [] for key in pairs}
    for counts in resamples(rows, units):
        for key, (_, pair) in pairs.items():
            drawn[key].append(pair.change(counts))
    return {key: _difference(measure, pair, np.concatenate(drawn[key])) for key, (measure, pair) in pairs.items()}


def drawn_at_a_time(rows: int, units: Units | None) -> int:
    """How many things a resample draws."""
    return rows if units is None else len(np.unique(units))


def resamples(rows: int, units: Units | None = None) -> Iterator[Array]:
    """How often each resample draws each row, shape (resamples, rows), in portions that fit into memory.

    Args:
        units: of each row the number of the unit that it is drawn with, shape (rows); None: each row by itself. Each
            resample draws as many units as there are, with all their rows.
    """
    if units is not None:
        _, own = np.unique(units, return_inverse=True)
        for counts in resamples(int(own.max(initial=-1)) + 1):
            step = max(1, AT_ONCE // rows)
            yield from (counts[i : i + step, own] for i in range(0, len(counts), step))
        return
    generator = np.random.default_rng(SEED)
    left = max(MIN_RESAMPLES, min(RESAMPLES, DRAWS // rows))
    while left > 0:
        size = min(left, max(1, AT_ONCE // rows))
        # Two arrays of one shape: to add a column to all others numpy takes a buffer, and ends the process if there is
        # no memory for it.
        places = generator.integers(0, rows, size * rows)
        places += np.repeat(np.arange(0, size * rows, rows), rows)
        yield np.bincount(places, minlength=size * rows).reshape(size, rows).astype(np.float64)
        left -= size


def _difference(measure: Measure, pair: Pairs, drawn: Array) -> Difference:
    counted = int(np.count_nonzero(pair.base_weights + pair.tuned_weights))
    return difference_of(measure, float(pair.change(np.ones(len(pair.base)))), drawn, counted)


def difference_of(measure: Measure, change: float, drawn: Array, counted: int) -> Difference:
    """The difference of two models, with the interval that its resamples give.

    Args:
        change: tuned minus base, over all rows.
        drawn: the same of each resample, shape (resamples).
        counted: how many rows count.
    """
    tail = (100 - LEVEL) / 2
    usable = drawn[np.isfinite(drawn)]  # a resample without any row that counts has no value
    low, high = np.percentile(usable, [tail, 100 - tail]) if len(usable) else (np.nan, np.nan)
    verdict = _verdict(measure, low, high) if np.isfinite(change + low + high) else NOT_FINITE
    return Difference(change, float(low), float(high), counted, verdict, _sentence(measure, verdict, change, low, high))


def _verdict(measure: Measure, low: float, high: float) -> str:
    if low > 0 or high < 0:
        return "better" if (low > 0) == measure.more_is_better else "worse"
    return "no clear difference"


def _sentence(measure: Measure, verdict: str, change: float, low: float, high: float) -> str:
    """As `better by 31 points, 95% interval 24 to 38`. Like the verdict, the interval has no sign."""
    if verdict == NOT_FINITE:
        return "not finite: no difference can be told"
    if verdict == "no clear difference":
        ends = f"{measure.amount(low, sign=True)} to {measure.amount(high, sign=True)}"
        return f"{verdict}, {LEVEL}% interval {ends}"
    near, far = sorted((abs(low), abs(high)))
    by = f"{measure.amount(abs(change))}{' points' if measure.is_percent else ''}"
    return f"{verdict} by {by}, {LEVEL}% interval {measure.amount(near)} to {measure.amount(far)}"
