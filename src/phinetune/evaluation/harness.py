"""Tasks of EleutherAI's lm-evaluation-harness on base and tuned model, side by side."""

from __future__ import annotations

import contextlib
import difflib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedTokenizerBase

from phinetune.errors import ConfigError, DataError
from phinetune.evaluation.bootstrap import Difference, Pairs, differences
from phinetune.measures import Measure

NEEDED = "pip install 'phinetune[harness]'"


@dataclass(frozen=True)
class TaskResult:
    """One metric of one task.

    Attributes:
        metric: as the harness names it: metric and filter, `acc,none`.
        values, errors: by model (`base`, `tuned`); the standard error is None where the harness has none.
        difference: tuned minus base over the task's documents; None for one model, and for metrics that are no mean
            over documents.
    """

    task: str
    metric: str
    more_is_better: bool
    values: dict[str, float]
    errors: dict[str, float | None]
    difference: Difference | None

    def to_dict(self) -> dict[str, Any]:
        difference = self.difference.to_dict() if self.difference else None
        return {**vars(self), "difference": difference}


def run_tasks(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    include_path: str | Path | None = None,
    limit: int | None = None,
    batch_size: int | None = None,
    chat_template: bool = False,
    console: Console,
) -> list[TaskResult]:
    """Run the harness's tasks without and with the adapter; a model without one is `base` alone.

    Args:
        include_path: a folder of task files (YAML) of the user's own.
        limit: documents of a task; None is all.
        chat_template: put every prompt into the checkpoint's chat template.

    Raises:
        ConfigError: the harness is not installed, or a task is unknown.
        DataError: a task's data can't be had.
    """
    if find_spec("lm_eval") is None:
        raise ConfigError(f"--tasks needs EleutherAI's lm-evaluation-harness: {NEEDED}")
    if include_path is not None and not Path(include_path).expanduser().is_dir():
        raise ConfigError(f"--include-path {include_path}: no such folder")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = _manager(tasks, include_path)
    from lm_eval.models.huggingface import HFLM

    language_model = HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size or 8)
    found: dict[str, Mapping[str, Any]] = {}
    for name, side in _sides(model):
        console.print(f"Running {', '.join(tasks)} on {name} …", highlight=False)
        with side():
            found[name] = _evaluate(language_model, tasks, manager, limit, chat_template)
    return list(_results(found))


def _manager(tasks: Sequence[str], include_path: str | Path | None) -> Any:
    """The harness's index of tasks; its own thousands of files are read only if the user's folder is not enough."""
    from lm_eval.tasks import TaskManager

    folder = None if include_path is None else str(Path(include_path).expanduser())
    manager = TaskManager(include_path=folder, include_defaults=False) if folder else None
    if manager is None or any(task not in manager.all_tasks for task in tasks):
        manager = TaskManager(include_path=folder)
    unknown = [task for task in tasks if task not in manager.all_tasks]
    problems = []
    for task in unknown:
        near = difflib.get_close_matches(task, manager.all_tasks, n=1)
        hint = f"; did you mean `{near[0]}`?" if near else ""
        problems.append(
            f"--tasks {task}: the harness has no such task{hint} (--include-path adds a folder of your own)"
        )
    if problems:
        raise ConfigError(problems)
    return manager


def _sides(model: Any) -> Iterator[tuple[str, Callable[[], Any]]]:
    if not hasattr(model, "disable_adapter"):
        yield "base", contextlib.nullcontext
        return
    yield "base", model.disable_adapter
    yield "tuned", contextlib.nullcontext


def _evaluate(
    language_model: Any, tasks: Sequence[str], manager: Any, limit: int | None, chat_template: bool
) -> Mapping[str, Any]:
    from lm_eval import simple_evaluate

    try:
        found: Mapping[str, Any] = simple_evaluate(
            model=language_model,
            tasks=list(tasks),
            task_manager=manager,
            limit=limit,
            apply_chat_template=chat_template,
            bootstrap_iters=1000,
        )
    except (OSError, ValueError, KeyError) as error:  # what datasets and the harness raise over data
        raise DataError(f"--tasks {','.join(tasks)}: {type(error).__name__}: {error}") from error
    return found


def _results(found: Mapping[str, Mapping[str, Any]]) -> Iterator[TaskResult]:
    one = next(iter(found.values()))
    for task, numbers in one["results"].items():
        for metric, value in numbers.items():
            name, _, chosen = metric.partition(",")
            if not chosen or name.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            more = one.get("higher_is_better", {}).get(task, {}).get(name) is not False
            values = {side: float(all_found["results"][task][metric]) for side, all_found in found.items()}
            errors = {side: _error(all_found["results"][task], name, chosen) for side, all_found in found.items()}
            yield TaskResult(task, metric, more, values, errors, _difference(found, task, metric, more, values))


def _error(numbers: Mapping[str, Any], name: str, chosen: str) -> float | None:
    error = numbers.get(f"{name}_stderr,{chosen}")
    return float(error) if isinstance(error, (int, float)) else None


def _difference(
    found: Mapping[str, Mapping[str, Any]], task: str, metric: str, more: bool, values: Mapping[str, float]
) -> Difference | None:
    """By paired bootstrap over the documents, where the metric is a mean over them."""
    if len(found) != 2:
        return None
    name, _, chosen = metric.partition(",")
    rows = []
    for side, all_found in found.items():
        samples = [s for s in all_found.get("samples", {}).get(task, []) if s.get("filter", chosen) == chosen]
        numbers = [s.get(name) for s in sorted(samples, key=lambda sample: sample["doc_id"])]
        if not numbers or not all(isinstance(number, (int, float)) for number in numbers):
            return None
        rows.append(np.array(numbers, dtype=np.float64))
        if not np.isclose(rows[-1].mean(), values[side], rtol=1e-9, atol=1e-12):
            return None
    base, tuned = rows
    ones = np.ones(len(base))
    measure = Measure(name, name, "{:.4f}", more, False)
    return differences({name: (measure, Pairs(base, tuned, ones, ones))}, len(ones)).get(name)


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
