"""The page of a data curve: held-out loss over training rows, the law through the points, and what it foretells."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from phinetune.files import write_text
from phinetune.reporting import views
from phinetune.reporting.render import render_page

WIDTH, HEIGHT = 640.0, 300.0  # of the picture, in its own units
LEFT, RIGHT, TOP, BOTTOM = 58.0, 16.0, 14.0, 40.0
TICKS = 5


def write_curve_page(tree: Mapping[str, Any], name: str, out: Path) -> None:
    """Write the page of a curve.

    Args:
        tree: as curve.json holds it.
    """
    write_text(out, curve_page(tree, name), private=True)


def curve_page(tree: Mapping[str, Any], name: str) -> str:
    """The HTML page of a curve."""
    return render_page("curve.html", charts=[], curve=tree, name=name, picture=picture(tree), views=views)


def picture(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Where the picture's parts are: axes, the law and its band, the points, the forecast."""
    points, then, band = tree["points"], tree["forecast"], tree["band"]
    last = points[-1]["loss"]
    ends = (last - then["high"], last - then["low"])
    shown = [*ends, *(one[key] for one in points for key in ("low", "high")), *(one["loss"] for one in band)]
    x = _Axis(math.log(points[0]["rows"]), math.log(then["rows"]), LEFT, WIDTH - RIGHT, logarithmic=True)
    y = _Axis(min(shown), max(shown), HEIGHT - BOTTOM, TOP)
    edge = [(one["rows"], one["low"]) for one in band] + [(one["rows"], one["high"]) for one in reversed(band)]
    return {
        "size": (WIDTH, HEIGHT),
        "frame": (LEFT, TOP, WIDTH - RIGHT, HEIGHT - BOTTOM),
        "rows": [(x.at(rows), f"{rows:,}") for rows in [*(point["rows"] for point in points), then["rows"]]],
        "losses": [(y.at(value), f"{value:.3g}") for value in y.ticks()],
        "law": _line([(one["rows"], one["loss"]) for one in band], x, y),
        "band": _line([(rows, y.kept(loss)) for rows, loss in edge], x, y),
        "points": [
            {"x": x.at(one["rows"]), "y": y.at(one["loss"]), "low": y.at(one["low"]), "high": y.at(one["high"])}
            for one in points
        ],
        "forecast": {"x": x.at(then["rows"]), "y": y.at(then["loss"]), "low": y.at(ends[0]), "high": y.at(ends[1])},
    }


class _Axis:
    """Places of values on a line from `start` to `stop`."""

    def __init__(self, low: float, high: float, start: float, stop: float, *, logarithmic: bool = False) -> None:
        margin = 0.05 * ((high - low) or 1.0)
        self.low, self.high = low - margin, high + margin
        self.start, self.stop, self.logarithmic = start, stop, logarithmic

    def at(self, value: float) -> float:
        place = math.log(value) if self.logarithmic else value
        share = (place - self.low) / (self.high - self.low)
        return round(self.start + share * (self.stop - self.start), 2)

    def kept(self, value: float) -> float:
        """The value, or the end that it lies beyond."""
        return min(self.high, max(self.low, value))

    def ticks(self) -> list[float]:
        """About `TICKS` round values."""
        step = (self.high - self.low) / TICKS
        size = 10.0 ** math.floor(math.log10(step))
        step = next(size * factor for factor in (1, 2, 5, 10) if size * factor >= step)
        first = math.ceil(self.low / step)
        return [step * number for number in range(first, math.floor(self.high / step) + 1)]


def _line(points: Sequence[tuple[float, float]], x: _Axis, y: _Axis) -> str:
    return " ".join(f"{x.at(rows):.1f},{y.at(loss):.1f}" for rows, loss in points)
