"""Runs tasks of EleutherAI's lm-evaluation-harness on the base and the tuned model, and compares the results."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

from phinetune.chats.template_rendering import apply_template
from phinetune.errors import ConfigError, DataError, reason_of
from phinetune.evaluation.bootstrap import Difference, Pairs, differences
from phinetune.evaluation.compare import Side, sides_of
from phinetune.metric_table import Measure

_END = "zqxENDzqx"  # letters that no template writes itself
NEEDED = "pip install 'phinetune[harness]'"


@dataclass(frozen=True)
class TaskResult:
    """One metric of one task.

    Attributes:
        metric: the harness's name: the metric and its filter, for example `acc,none`.
        values: the metric of each model (`base`, `tuned`).
        errors: its standard error for each model; None if the harness gives none.
        difference: tuned minus base, over the task's documents. None if there is only one model, or the metric is not a
            mean over documents.
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
    manager: Any,
    *,
    limit: int | None = None,
    batch_size: int | None = None,
    chat_template: bool = False,
    base: Side | None = None,
    on_side: Callable[[str], None] = lambda side: None,
) -> list[TaskResult]:
    """Run the harness's tasks without and with the adapter.

    A model without an adapter is `base`, and there is no `tuned`.

    Args:
        manager: what `open_tasks` returned for these tasks.
        limit: how many documents of each task to take; None is all.
        batch_size: how many requests the model computes together; None is 8.
        chat_template: whether to put every prompt into the checkpoint's chat template.
        base: see `phinetune.evaluation.compare.compare`.
        on_side: called with `base` or `tuned` before this model begins.

    Raises:
        DataError: a task's data can't be loaded.
    """
    outputs: dict[str, Mapping[str, Any]] = {}
    for name, opened in sides_of(model, base).items():
        on_side(name)
        with opened() as one:
            language_model = _language_model(one, tokenizer, batch_size or 8)
            outputs[name] = _evaluate(language_model, tasks, manager, limit, chat_template)
    return list(_results(outputs))


def _language_model(model: Any, tokenizer: PreTrainedTokenizerBase, batch_size: int) -> Any:
    """The harness's view of a model. Chats are rendered within the limits that a stranger's template has here."""
    from lm_eval.models.huggingface import HFLM

    class Limited(HFLM):  # type: ignore[misc]
        def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
            try:
                return _rendered(tokenizer, chat_history, add_generation_prompt)
            except TemplateError:  # as the harness does it: there are templates that take no system message
                rest = [message for message in chat_history if message["role"] != "system"]
                return _rendered(tokenizer, rest, add_generation_prompt)

    return Limited(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size)


def _rendered(tokenizer: PreTrainedTokenizerBase, chat: Sequence[Mapping[str, str]], reply: bool) -> str:
    """A chat as text. Without `reply` the model goes on with its last message, so the text ends where that does."""
    if reply:
        return apply_template(tokenizer, [chat], reply=True)[0]
    # A template that strips messages takes the space behind the mark away. Then it would take away the message's, too.
    marked = {**chat[-1], "content": f"{chat[-1]['content']}{_END} "}
    text = apply_template(tokenizer, [[*chat[:-1], marked]], reply=False)[0]
    end = text.rfind(_END)
    if end < 0:
        raise DataError("--tasks: the chat template changes the last message, so the model can't go on with it")
    return text[:end] if text.startswith(f"{_END} ", end) else text[:end].rstrip()


def open_tasks(tasks: Sequence[str], include_path: str | Path | None = None) -> Any:
    """The harness's index of tasks. No model is needed for it.

    The harness's own files are thousands. They are read only if a task is not in the user's folder.

    Args:
        include_path: a folder with the user's own task files (YAML).

    Raises:
        ConfigError: the harness is not installed, the folder does not exist, or a task is unknown.
    """
    if find_spec("lm_eval") is None:
        raise ConfigError(f"--tasks needs EleutherAI's lm-evaluation-harness: {NEEDED}")
    if include_path is not None and not Path(include_path).expanduser().is_dir():
        raise ConfigError(f"--include-path {include_path}: no such folder")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
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


def _evaluate(
    language_model: Any, tasks: Sequence[str], manager: Any, limit: int | None, chat_template: bool
) -> Mapping[str, Any]:
    from lm_eval import simple_evaluate

    try:
        output: Mapping[str, Any] = simple_evaluate(
            model=language_model,
            tasks=list(tasks),
            task_manager=manager,
            limit=limit,
            apply_chat_template=chat_template,
            bootstrap_iters=1000,
        )
    except TemplateError as error:
        raise DataError(f"--tasks {','.join(tasks)}: the chat template refuses a prompt: {reason_of(error)}") from error
    except (OSError, ValueError, KeyError) as error:  # datasets and the harness raise these for problems with data
        raise DataError(f"--tasks {','.join(tasks)}: {type(error).__name__}: {error}") from error
    return output


def _results(outputs: Mapping[str, Mapping[str, Any]]) -> Iterator[TaskResult]:
    """The result of each task and metric, from the harness's output for each model."""
    first = next(iter(outputs.values()))
    for task, numbers in first["results"].items():
        for metric, value in numbers.items():
            name, _, filter_name = metric.partition(",")
            if not filter_name or name.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            more = first.get("higher_is_better", {}).get(task, {}).get(name) is not False
            values = {side: float(output["results"][task][metric]) for side, output in outputs.items()}
            errors = {side: _error(output["results"][task], name, filter_name) for side, output in outputs.items()}
            yield TaskResult(task, metric, more, values, errors, _difference(outputs, task, metric, more, values))


def _error(numbers: Mapping[str, Any], name: str, filter_name: str) -> float | None:
    error = numbers.get(f"{name}_stderr,{filter_name}")
    return float(error) if isinstance(error, (int, float)) else None


def _difference(
    outputs: Mapping[str, Mapping[str, Any]], task: str, metric: str, more: bool, values: Mapping[str, float]
) -> Difference | None:
    """The difference by a paired bootstrap over the documents; None if the metric is not a mean over them."""
    if len(outputs) != 2:
        return None
    name, _, filter_name = metric.partition(",")
    rows = []
    for side, output in outputs.items():
        samples = [s for s in output.get("samples", {}).get(task, []) if s.get("filter", filter_name) == filter_name]
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
