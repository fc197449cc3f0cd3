"""Callbacks that a program gives to its run."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import TrainerCallback

from phinetune.errors import ConfigError

Callback = TrainerCallback | type[TrainerCallback]


def made_callbacks(given: Sequence[Callback] | None) -> list[TrainerCallback]:
    """The callbacks as objects: a class is called without arguments, as transformers' trainer does.

    Raises:
        ConfigError: one is no `TrainerCallback`, or its class wants arguments.
    """
    if given is None:  # as transformers' trainer takes it
        return []
    if not isinstance(given, (list, tuple)):
        raise ConfigError(f"callbacks: a list of transformers.TrainerCallback, not a `{type(given).__name__}`")
    made, problems = [], []
    for number, one in enumerate(given):
        try:
            callback = one() if isinstance(one, type) else one
        except TypeError as error:
            problems.append(f"callbacks[{number}]: {one.__name__}() can't be made: {error}; give an object")
            continue
        if isinstance(callback, TrainerCallback):
            made.append(callback)
        else:
            problems.append(f"callbacks[{number}]: a `{type(callback).__name__}` is no transformers.TrainerCallback")
    if problems:
        raise ConfigError(problems)
    return made
