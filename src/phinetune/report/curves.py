"""The plots of a page: which numbers of metrics.jsonl, over the steps, as the page's script draws them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from phinetune.measures import MEASURES
from phinetune.report.facts import RunFacts

POINTS = 1500  # a curve's at most; a plot is some hundred pixels wide
GIB = 2**30
Point = tuple[int, float | None]


class Curve(NamedTuple):
    """One plot: the key in metrics.jsonl, its title, and how its numbers read.

    `form` names a format of the page's script; `scale` is multiplied in; `from_zero` starts the axis there.
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
# Plotted where it was measured during training.
HELD_OUT_ACCURACY = Curve("eval_token_accuracy", "Held-out token accuracy", "%", "short", 100)
# Evaluation's other numbers are plotted where there are any; these say nothing about the model, or the loss again.
NOT_PLOTTED = ("eval_loss", "eval_perplexity", "eval_runtime", "eval_samples_per_second", "eval_steps_per_second")


def charts(runs: Sequence[RunFacts]) -> list[dict[str, Any]]:
    """Every plot as the page embeds it: title, unit, form, and a series a run that has points."""
    return [chart for curve in [*CURVES, *_more_curves(runs)] if (chart := _chart(curve, runs))]


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
    """What stands in place of a plot that has no points."""
    if curve.key != "eval_loss":
        return "Not recorded in this run."
    strategies = [(run.config.get("training_config") or {}).get("eval_strategy", "no") for run in runs]
    if any(str(strategy) not in ("no", "False") for strategy in strategies):
        return "Not measured yet."
    return "Not measured during training: set training_config.eval_strategy."


def _points(curve: Curve, run: RunFacts) -> list[Point]:
    """(step, value) in order, the last of a step; None where the number was not finite."""
    found = {int(entry["step"]): _number(entry[curve.key]) for entry in run.entries if curve.key in entry}
    if curve.key == "eval_loss":
        found = {**_ends(run), **found}
    return sorted(found.items())


def _ends(run: RunFacts) -> dict[int, float | None]:
    """The losses of base and tuned model, measured on the same held-out chats once the run had ended."""
    own = run.results.get("evaluation") or {}
    steps = (run.results.get("training") or {}).get("steps")
    places = {"base": 0, "tuned": steps}
    return {
        place: _number(own[side].get("loss"))
        for side, place in places.items()
        if place is not None and isinstance(own.get(side), dict)
    }


def _more_curves(runs: Sequence[RunFacts]) -> list[Curve]:
    keys = {key for run in runs for entry in run.entries for key in entry if key.startswith("eval_")}
    headings = {f"eval_{measure.key}": measure.heading for measure in MEASURES}
    made = []
    for key in sorted(keys - set(NOT_PLOTTED)):
        if key == HELD_OUT_ACCURACY.key:
            made.append(HELD_OUT_ACCURACY)
        elif any(_number(entry.get(key)) is not None for run in runs for entry in run.entries):
            title = headings.get(key, key.removeprefix("eval_").replace("_", " "))
            made.append(Curve(key, f"Held-out {title.removesuffix(' %')}", "", "short"))
    return made


def _number(value: Any) -> float | None:
    plain = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if plain and math.isfinite(value) else None


def _round(value: float | None, scale: float) -> float | None:
    return None if value is None else float(f"{value * scale:.6g}")


def thin(points: Sequence[Point], limit: int = POINTS) -> list[Point]:
    """At most `limit` points: of each stretch the lowest and the highest, so that no spike is lost, and the last."""
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
    """The newest finite numbers under `key`."""
    found = (_number(entry.get(key)) for entry in reversed(entries))
    return [value for value, _ in zip((v for v in found if v is not None), range(count), strict=False)]
