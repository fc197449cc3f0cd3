"""The settings nearest to a run's own that the memory is enough for."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import torch

from phinetune.planning.setup import Setup

SMALLEST_LENGTH = 256  # tokens: below it hardly a chat would be left whole

Changes = dict[str, Any]


def nearest_fitting(run: Setup) -> list[Changes]:
    """Changes after which the run fits: each kind alone, no greater than it must be; if none does, all together."""
    together: Changes = {}
    fitting: list[Changes] = []
    for options in _kinds(run):
        found = next((one for one in options if fits(run.changed(one))), None)
        if found:
            fitting.append(found)
        elif options:
            together |= options[-1]
    if not fitting and together and fits(run.changed(together)):
        return [together]
    return fitting


def fits(run: Setup) -> bool:
    """Whether the memory is enough."""
    return run.need().memory.total <= run.free


def _kinds(run: Setup) -> Iterator[list[Changes]]:
    """Kinds of change, those that cost least first, each from small to large."""
    if run.config.engine.activation_memory != "auto":
        yield [{"engine.activation_memory": "auto"}]
    yield list(_smaller_batches(run.args.per_device_train_batch_size, run.args.gradient_accumulation_steps))
    yield list(_shorter(int(run.lengths.max())))
    if run.dtype == torch.float32:
        yield [{"model.dtype": "bfloat16"}]
    if run.config.model.quantization == "none" and find_spec("bitsandbytes"):
        yield [{"model.quantization": "nf4"}]


def _smaller_batches(size: int, batches: int) -> Iterator[Changes]:
    """As many rows a step, in more micro-batches."""
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
