"""Metrics of the user's own: a Python function that the configuration names, never one that data names."""

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

from phinetune.chat.template import Message
from phinetune.config.run import CustomMetric
from phinetune.errors import ConfigError, RunError


def load_all(metrics: Sequence[CustomMetric]) -> dict[str, Callable[[str, str, Sequence[Message]], float | None]]:
    """The function of each metric that names one.

    Raises:
        ConfigError: no such file, module or function, or not one of two or three arguments; all problems at once.
    """
    found: dict[str, Callable[[str, str, Sequence[Message]], float | None]] = {}
    problems = []
    for metric in metrics:
        if metric.function is None:
            continue
        try:
            found[metric.name] = _wrapped(metric.name, metric.function)
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
    return found


def _wrapped(name: str, place: str) -> Callable[[str, str, Sequence[Message]], float | None]:
    source, _, attribute = place.rpartition(":")
    module = _load(source, place)
    function = getattr(module, attribute, None)
    if not callable(function):
        raise ConfigError(f"evaluation.metrics: {place}: there is no function `{attribute}` in {source}")
    try:
        takes = len([p for p in inspect.signature(function).parameters.values() if p.kind in (0, 1)])
    except (TypeError, ValueError):
        takes = 2
    if takes not in (2, 3):
        raise ConfigError(
            f"evaluation.metrics: {place}: it takes {takes} arguments; write it as function(answer, reference) or "
            "function(answer, reference, messages)"
        )
    return functools.partial(_call, function, takes, name)


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
    except Exception as error:  # whatever the user's own file does when it is imported
        raise ConfigError(
            f"evaluation.metrics: {place}: could not be imported: {type(error).__name__}: {error}"
        ) from error


def _call(
    function: Callable[..., Any], takes: int, name: str, answer: str, reference: str, messages: Sequence[Message]
) -> float | None:
    """The function's number; true and false are 100 and 0."""
    try:
        value = function(*(answer, reference, messages)[:takes])
    except Exception as error:  # the user's own code
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
