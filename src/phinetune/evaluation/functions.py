"""Loads metrics of the user's own: Python functions that the configuration names. Data can't name a function."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from phinetune.chats.template import Message
from phinetune.config.own_metrics import UNBOUND, CustomMetric, GivenFunction
from phinetune.errors import ConfigError, RunError

RowFunction = Callable[[str, str, Sequence[Message]], float | None]
SetFunction = Callable[[Sequence[str], Sequence[str], Sequence[Sequence[Message]]], Any]


def row_function(metric: CustomMetric) -> RowFunction:
    """The function of a metric that names one for single answers.

    Raises:
        ConfigError: there is no such file, module or function, or it does not take two or three arguments.
    """
    function, arguments = _found(metric, "function(answer, reference)", "function(answer, reference, messages)")
    return functools.partial(_call, function, arguments, metric.name)


def set_function(metric: CustomMetric) -> SetFunction:
    """The function of a metric that names one for all answers together. It returns what the user's function does.

    Raises:
        ConfigError: as `row_function`.
    """
    function, arguments = _found(metric, "compute(answers, references)", "compute(answers, references, messages)")
    return functools.partial(_call_with_all, function, arguments)


def _found(metric: CustomMetric, *forms: str) -> tuple[Callable[..., Any], int]:
    """The function that a metric names, and how many arguments it is to be called with: two or three."""
    called = metric.called
    function: Any
    if isinstance(called, GivenFunction):
        function, place = called.function, called.place
    else:
        place = str(called)
        source, _, attribute = place.rpartition(":")
        if source == UNBOUND:
            raise ConfigError(
                f"evaluation.metrics: {place}: a script or a notebook gave this function; start from there again, or "
                "name it as file.py:function"
            )
        function = getattr(_load(source, place), attribute, None)
        if not callable(function):
            raise ConfigError(f"evaluation.metrics: {place}: there is no function `{attribute}` in {source}")
    arguments = _arguments(function)
    if arguments not in (2, 3):
        counted = "1 argument" if arguments == 1 else f"{arguments} arguments"
        trainers = (
            " (no logits are kept, so a trainer's `compute_metrics` has to be rewritten)" if arguments == 1 else ""
        )
        raise ConfigError(
            f"evaluation.metrics: {place}: it takes {counted}; write it as {' or '.join(forms)}{trainers}"
        )
    return function, arguments


def _arguments(function: Callable[..., Any]) -> int:
    """How many arguments a function takes by their places; three if it takes any number, two if nobody can tell."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return 2
    placed = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if any(p.kind is p.VAR_POSITIONAL for p in parameters) and len(placed) <= 3:
        return 3
    needed = [p for p in placed if p.default is p.empty]
    return len(placed) if len(placed) <= 3 else max(len(needed), 3)


def _call_with_all(
    function: Callable[..., Any],
    arguments: int,
    answers: Sequence[str],
    references: Sequence[str],
    messages: Sequence[Sequence[Message]],
) -> Any:
    """What the user's function returns. It gets lists of its own, so it may change them."""
    return function(*(list(answers), list(references), [list(chat) for chat in messages])[:arguments])


def _load(source: str, place: str) -> ModuleType:
    try:
        if not source.endswith(".py"):
            return importlib.import_module(source)
        file = Path(source).expanduser()
        if not file.is_file():
            raise ConfigError(f"evaluation.metrics: {place}: no such file: {source}")
        spec = importlib.util.spec_from_file_location(f"phinetune_metric_{file.stem}", file)
        assert spec
        assert spec.loader
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    except ConfigError:
        raise
    except Exception as error:  # the user's file may raise anything when it is imported
        raise ConfigError(
            f"evaluation.metrics: {place}: could not be imported: {type(error).__name__}: {error}"
        ) from error


def _call(
    function: Callable[..., Any], arguments: int, name: str, answer: str, reference: str, messages: Sequence[Message]
) -> float | None:
    """The number that the function gives for an answer. True and false count as 100 and 0."""
    try:
        value = function(*(answer, reference, messages)[:arguments])
    except Exception as error:  # the user's function may raise anything
        raise RunError(
            f"evaluation.metrics: `{name}` failed on the answer {answer[:60]!r}: {type(error).__name__}: {error}"
        ) from error
    if value is None:
        return None
    if isinstance(value, bool):
        return 100.0 * value
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise RunError(f"evaluation.metrics: `{name}` gave {value!r}; it must give a number, true, false or None")
    return number
