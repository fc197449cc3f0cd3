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
from phinetune.config.evaluation import CustomMetric
from phinetune.errors import ConfigError, RunError


def load_all(metrics: Sequence[CustomMetric]) -> dict[str, Callable[[str, str, Sequence[Message]], float | None]]:
    """The function of each metric that names one, by the metric's name.

    Raises:
        ConfigError: a file, a module or a function does not exist, or a function does not take two or three arguments;
            the error lists all problems.
    """
    functions: dict[str, Callable[[str, str, Sequence[Message]], float | None]] = {}
    problems = []
    for metric in metrics:
        if metric.function is None:
            continue
        try:
            functions[metric.name] = _wrapped(metric.name, metric.function)
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
    return functions


def _wrapped(name: str, place: str) -> Callable[[str, str, Sequence[Message]], float | None]:
    source, _, attribute = place.rpartition(":")
    module = _load(source, place)
    function = getattr(module, attribute, None)
    if not callable(function):
        raise ConfigError(f"evaluation.metrics: {place}: there is no function `{attribute}` in {source}")
    try:
        arguments = len([p for p in inspect.signature(function).parameters.values() if p.kind in (0, 1)])
    except (TypeError, ValueError):
        arguments = 2
    if arguments not in (2, 3):
        raise ConfigError(
            f"evaluation.metrics: {place}: it takes {arguments} arguments; write it as function(answer, reference) or "
            "function(answer, reference, messages)"
        )
    return functools.partial(_call, function, arguments, name)


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
