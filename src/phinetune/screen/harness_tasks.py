"""Results of lm-evaluation-harness on the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from phinetune.evaluation.harness import TaskResult


def show_tasks(results: Sequence[TaskResult], console: Console) -> None:
    """A line a metric: both models with their standard errors, and whether the difference is more than chance."""
    sides = list(results[0].values) if results else []
    table = Table("task", "metric")
    for name in sides:
        table.add_column(name, justify="right")
    if len(sides) == 2:
        table.add_column("tuned against base")
    for one in results:
        cells = [_with_error(one.values[name], one.errors[name]) for name in sides]
        said = [one.difference.text if one.difference else ""] if len(sides) == 2 else []
        table.add_row(one.task, one.metric.removesuffix(",none"), *cells, *said)
    console.print(table)


def _with_error(value: float, error: float | None) -> str:
    return f"{value:.4f}" + (f" ± {error:.4f}" if error is not None else "")
