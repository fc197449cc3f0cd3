"""Metrics over the whole set of answers: numbers that are no mean of numbers a row, such as a macro-F1.

Their intervals come from the same paired bootstrap as those of the others (`phinetune.evaluation.bootstrap`). Here each
resample calls the metric for both models, so how many there are depends on how long a call takes.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from phinetune.chats.template import Message
from phinetune.config.own_metrics import CustomMetric
from phinetune.durations import spell_seconds
from phinetune.errors import RunError
from phinetune.evaluation.bootstrap import SEED, Array, Difference, Units, difference_of, drawn_at_a_time
from phinetune.metric_table import measures_of

RESAMPLES = (1_000, 300, 100)  # the most that take no longer than `PATIENCE` are drawn
PATIENCE = 30.0  # seconds that the resamples of one metric may take


@dataclass(frozen=True)
class Judged:
    """Answers with what they are judged by, one an index."""

    answers: Sequence[str]
    references: Sequence[str]
    messages: Sequence[Sequence[Message]]

    def __len__(self) -> int:
        return len(self.answers)

    def at(self, places: Sequence[int]) -> Judged:
        """The answers at some places, of which one may stand there several times."""
        return Judged(
            [self.answers[i] for i in places],
            [self.references[i] for i in places],
            [self.messages[i] for i in places],
        )


@dataclass(frozen=True)
class SetMetric:
    """A metric that is counted from all answers at once.

    Attributes:
        metric: what the user named.
        function: called with answers, references and messages; gives a number, or numbers by name.
    """

    metric: CustomMetric
    function: Callable[[Sequence[str], Sequence[str], Sequence[Sequence[Message]]], Any]

    def __call__(self, judged: Judged) -> dict[str, float]:
        """Its numbers, by their keys in results.json.

        Raises:
            RunError: the function failed, or gave something that is no number or not finite.
        """
        name = self.metric.name
        try:
            made = self.function(judged.answers, judged.references, judged.messages)
        except Exception as error:  # the user's function may raise anything
            raise RunError(
                f"evaluation.metrics: `{name}` failed on {len(judged)} answers: {type(error).__name__}: {error}"
                + self._alone(judged)
            ) from error
        named = {f"{name}_{key}": value for key, value in made.items()} if isinstance(made, Mapping) else {name: made}
        if not named:
            raise RunError(f"evaluation.metrics: `{name}` gave a dictionary without any number")
        return {key: self._number(key, value) for key, value in named.items()}

    def _number(self, key: str, value: Any) -> float:
        if not re.fullmatch(r"[a-z][a-z0-9_]*", key):
            raise RunError(
                f"evaluation.metrics: `{self.metric.name}` gave a number called {key!r}; its names must be small "
                "letters, digits and _"
            )
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = float("nan")
        if not np.isfinite(number):
            raise RunError(
                f"evaluation.metrics: `{self.metric.name}` gave {value!r} for `{key}`; it must give a number, or a "
                "dictionary of numbers"
            )
        return number

    def _alone(self, judged: Judged) -> str:
        """Which answer it fails on by itself too, as the end of a sentence; empty if there is none."""
        end = time.perf_counter() + PATIENCE
        for place in range(len(judged)):
            if time.perf_counter() > end:
                break
            one = judged.at([place])
            try:
                self.function(one.answers, one.references, one.messages)
            except Exception:
                return f" (it also fails on held-out prompt {place + 1} alone, answer {one.answers[0][:60]!r})"
        return ""

    def differences(
        self,
        base: Judged,
        tuned: Judged,
        before: Mapping[str, float],
        after: Mapping[str, float],
        seconds: float,
        units: Units | None = None,
    ) -> tuple[dict[str, Difference], list[str]]:
        """The differences between two models, and lines about intervals that come from few resamples or from none.

        Args:
            before, after: the numbers of each model.
            seconds: what both calls took that gave them.
            units: of each answer the number of what it is drawn with, as `bootstrap.resamples` takes them.
        """
        keys = [key for key in after if key in before]
        count, lines = self._affordable(seconds)
        if drawn_at_a_time(len(base), units) < 2 or not keys:
            return {}, []
        drawn: dict[str, list[float]] = {key: [] for key in keys}
        failed = 0
        for places in _resamples(len(base), count, units):
            try:
                sides = self(base.at(places)), self(tuned.at(places))
            except RunError:  # a resample may lack what the function needs, a class for example
                failed += 1
                continue
            for key in keys:
                if all(key in side for side in sides):
                    drawn[key].append(sides[1][key] - sides[0][key])
        if failed * 2 > count:
            drawn, lines = {key: [] for key in keys}, [self._no_interval("it fails on more than half of the resamples")]
        measures = measures_of(
            keys,
            [key for key in keys if self.metric.is_less_better(key)],
            keys if self.metric.is_percent else (),
            {key: [before[key], after[key]] for key in keys},
        )
        found: dict[str, Difference] = {}
        for one in measures:
            if drawn[one.key]:
                change = after[one.key] - before[one.key]
                found[one.key] = difference_of(one, change, _array(drawn[one.key]), len(base))
        return found, lines

    def _affordable(self, seconds: float) -> tuple[int, list[str]]:
        """How many resamples to draw, and a line if they are fewer than `RESAMPLES` has at most."""
        wanted = self.metric.resamples
        if wanted != "auto":
            return wanted, []
        count = next((count for count in RESAMPLES if count * seconds <= PATIENCE), 0)
        if count == RESAMPLES[0]:
            return count, []
        if not count:
            took = spell_seconds(seconds * RESAMPLES[-1])
            why = f"{RESAMPLES[-1]} resamples would take {took}; `resamples: {RESAMPLES[-1]}` draws them all the same"
            return 0, [self._no_interval(why)]
        return count, [f"`{self.metric.name}`: its interval comes from {count} resamples, since its calls take long"]

    def _no_interval(self, why: str) -> str:
        return f"`{self.metric.name}`: no interval, since {why}"


def _resamples(rows: int, count: int, units: Units | None) -> Iterator[list[int]]:
    """The places that each resample draws, `count` times."""
    own = np.arange(rows) if units is None else units
    members = [np.flatnonzero(own == unit) for unit in np.unique(own)]
    generator = np.random.default_rng(SEED)
    for _ in range(count):
        drawn = generator.integers(0, len(members), len(members))
        yield np.concatenate([members[unit] for unit in drawn]).tolist()


def _array(values: Sequence[float]) -> Array:
    return np.asarray(values, dtype=np.float64)


@dataclass(frozen=True)
class Counted:
    """The numbers of one model, and how long they took to count, in seconds."""

    numbers: dict[str, float]
    seconds: float


def timed(metric: SetMetric, judged: Judged) -> Counted:
    """The numbers of a metric, with the time that they took."""
    started = time.perf_counter()
    numbers = metric(judged)
    return Counted(numbers, time.perf_counter() - started)
