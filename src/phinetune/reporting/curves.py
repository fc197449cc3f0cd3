"""The plots of a page: numbers of metrics.jsonl over the steps, in the form that the page's script draws."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from phinetune.metric_table import MEASURES
from phinetune.reporting.facts import RunFacts

POINTS = 1500  # most points of a curve; a plot is only some hundred pixels wide
GIB = 2**30
Point = tuple[int, float | None]  # step and value; None where the value is not finite


class Curve(NamedTuple):
    """One plot.

    Attributes:
        key: the numbers' key in metrics.jsonl.
        title, unit: as the page shows them.
        form: the name of a number format in the page's script: `loss`, `scientific` or `short`.
        scale: the factor by which numbers are multiplied, to be in `unit`.
        from_zero: whether the axis starts at zero.
    """

    key: str
    title: str
    unit: str
    form: str
    scale: float = 1.0
    from_zero: bool = False


CURVES = (
    Curve("loss", "Training loss", "nats a token", "loss"),
    Curve("eval_loss", "Held-out loss", "nats a token", "loss"),
    Curve("learning_rate", "Learning rate", "", "scientific", from_zero=True),
    Curve("grad_norm", "Gradient norm", "", "short", from_zero=True),
    Curve("tokens_per_s", "Speed", "tokens/s", "short", from_zero=True),
    Curve("memory", "Memory", "GiB", "short", 1 / GIB, from_zero=True),
)
# A page plots every other `eval_…` number of its runs, whatever logged it, except these. They repeat the loss, or say
# nothing about the model.
NOT_PLOTTED = ("eval_loss", "eval_perplexity", "eval_runtime", "eval_samples_per_second", "eval_steps_per_second")
# Such numbers have no unit and are not scaled, except these.
EVALUATION_CURVES = (Curve("eval_token_accuracy", "Held-out token accuracy", "%", "short", 100),)


def charts(runs: Sequence[RunFacts]) -> list[dict[str, Any]]:
    """All plots as the page embeds them: title, unit, form, and one series for each run that has points."""
    return [_chart(curve, runs) for curve in [*CURVES, *_evaluation_curves(runs)]]


def _chart(curve: Curve, runs: Sequence[RunFacts]) -> dict[str, Any]:
    series = []
    for number, run in enumerate(runs):
        points = thin(_points(curve, run))
        if points:
            xs, ys = [x for x, _ in points], [_round(y, curve.scale) for _, y in points]
            series.append({"name": run.name, "run": number, "x": xs, "y": ys})
    return {
        "key": curve.key,
        "title": curve.title,
        "unit": curve.unit,
        "form": curve.form,
        "fromZero": curve.from_zero,
        "series": series,
        "empty": _why_empty(curve, runs),
    }


def _why_empty(curve: Curve, runs: Sequence[RunFacts]) -> str:
    """What the page says in place of a plot that has no points."""
    if curve.key != "eval_loss":
        return "Not recorded in this run."
    strategies = [(run.config.get("training_config") or {}).get("eval_strategy", "no") for run in runs]
    if any(str(strategy) not in ("no", "False") for strategy in strategies):
        return "Not measured yet."
    return "Not measured during training: set training_config.eval_strategy."


def _points(curve: Curve, run: RunFacts) -> list[Point]:
    """The curve's points in the order of their steps. If a step was logged twice, the last value counts."""
    found = {int(entry["step"]): _number(entry[curve.key]) for entry in run.entries if curve.key in entry}
    if curve.key == "eval_loss":
        found = {**_final_losses(run), **found}
    return sorted(found.items())


def _final_losses(run: RunFacts) -> dict[int, float | None]:
    """The losses of base (step 0) and tuned model (last step), from the evaluation at the end of the run."""
    own = run.results.get("evaluation") or {}
    steps = (run.results.get("training") or {}).get("steps")
    places = {"base": 0, "tuned": steps}
    return {
        place: _number(own[side].get("loss"))
        for side, place in places.items()
        if place is not None and isinstance(own.get(side), dict)
    }


def _evaluation_curves(runs: Sequence[RunFacts]) -> list[Curve]:
    """A curve for each further `eval_…` key under which a run logged a finite number, in the order of the keys."""
    known = {curve.key: curve for curve in EVALUATION_CURVES}
    headings = {f"eval_{measure.key}": measure.heading for measure in MEASURES}
    keys = {
        key
        for run in runs
        for entry in run.entries
        for key, value in entry.items()
        if key.startswith("eval_") and _number(value) is not None
    }
    curves = []
    for key in sorted(keys - set(NOT_PLOTTED)):
        title = headings.get(key, key.removeprefix("eval_").replace("_", " "))
        curves.append(known.get(key) or Curve(key, f"Held-out {title.removesuffix(' %')}", "", "short"))
    return curves


def _number(value: Any) -> float | None:
    """The value as a finite number; None if it is none."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if is_number and math.isfinite(value) else None


def _round(value: float | None, scale: float) -> float | None:
    return None if value is None else float(f"{value * scale:.6g}")


def thin(points: Sequence[Point], limit: int = POINTS) -> list[Point]:
    """At most `limit` of the points, in order.

    From each stretch of neighbouring points it keeps the lowest and the highest, so that no spike is lost. It also
    keeps the last point.
    """
    if len(points) <= limit:
        return list(points)
    size = math.ceil(len(points) / (limit // 2 - 1))
    kept: list[Point] = []
    for start in range(0, len(points), size):
        stretch = points[start : start + size]
        known = [point for point in stretch if point[1] is not None]
        kept += sorted({min(known, key=_value), max(known, key=_value)}) if known else stretch[:1]
    return kept if kept[-1] == points[-1] else [*kept, points[-1]]


def _value(point: Point) -> float:
    return point[1] or 0.0


def last_values(entries: Sequence[Mapping[str, Any]], key: str, count: int) -> list[float]:
    """The newest finite numbers under `key`, at most `count` of them, the newest first."""
    found = (_number(entry.get(key)) for entry in reversed(entries))
    return [value for value, _ in zip((v for v in found if v is not None), range(count), strict=False)]
