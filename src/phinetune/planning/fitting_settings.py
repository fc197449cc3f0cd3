"""Finds the smallest changes of a run's settings with which the run fits into memory."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import torch

from phinetune.checkpoints.prequantized import held_as
from phinetune.planning.setup import Setup

SMALLEST_LENGTH = 256  # tokens; with less, hardly any chat would stay whole

Changes = dict[str, Any]


def nearest_fitting(run: Setup) -> list[Changes]:
    """Changes with which the run fits. Each is of one kind and as small as possible.

    If no kind alone is enough, the one entry combines all kinds. The list is empty if that is not enough either.
    """
    together: Changes = {}
    fitting: list[Changes] = []
    for options in _kinds(run):
        smallest = next((changes for changes in options if fits(run.changed(changes))), None)
        if smallest:
            fitting.append(smallest)
        elif options:
            together |= options[-1]
    if not fitting and together and fits(run.changed(together)):
        return [together]
    return fitting


def fits(run: Setup) -> bool:
    """Whether the run fits into the free memory."""
    return run.need().memory.total <= run.free


def _kinds(run: Setup) -> Iterator[list[Changes]]:
    """The kinds of change, those that cost least first. Each kind lists its changes from small to large."""
    if run.config.engine.activation_memory != "auto":
        yield [{"engine.activation_memory": "auto"}]
    yield list(_smaller_batches(run.args.per_device_train_batch_size, run.args.gradient_accumulation_steps))
    yield list(_shorter(int(run.lengths.max())))
    if run.dtype == torch.float32:
        yield [{"model.dtype": "bfloat16"}]
    if held_as(run.config.model, run.shape) == "none" and find_spec("bitsandbytes"):
        yield [{"model.quantization": "nf4"}]


def _smaller_batches(size: int, batches: int) -> Iterator[Changes]:
    """Smaller micro-batches, and so many more of them that a step keeps its rows."""
    rows = size * batches
    while size > 1:
        size //= 2
        yield {
            "training_config.per_device_train_batch_size": size,
            "training_config.gradient_accumulation_steps": -(-rows // size),
        }


def _shorter(longest: int) -> Iterator[Changes]:
    while longest > SMALLEST_LENGTH:
        longest = max(SMALLEST_LENGTH, longest // 2)
        yield {"training_config.max_length": longest}
