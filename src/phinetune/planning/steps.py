"""The steps of a run: how many, and how many tokens each takes, from the lengths of its rows alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.compute
from datasets import Dataset
from trl import SFTConfig

from phinetune.data.build import ChatSet
from phinetune.training.engine import Engine

EPOCHS_DRAWN = 8  # orders of the rows, over which the largest micro-batch is averaged


@dataclass(frozen=True)
class Steps:
    """The optimizer steps of a run.

    Attributes:
        rows: what a micro-batch is made of: chats, or rows filled with several.
        batches: micro-batches a step, on one process.
        tokens: of all steps.
        largest: tokens of the largest micro-batch to expect.
        mean: tokens of a micro-batch.
    """

    count: int
    rows: int
    batches: int
    tokens: int
    largest: int
    mean: float


def row_lengths(chats: ChatSet, engine: Engine | None) -> np.ndarray[Any, Any]:
    """Tokens of each row that a micro-batch is made of, shape (rows). Filling goes by the lengths too."""
    lengths = chats.lengths()
    if engine is None or not engine.fill:
        return lengths
    # Stand-ins of the same lengths, since filling asks for nothing else.
    ids = [[0] * int(n) for n in lengths]
    filled = engine.prepare(Dataset.from_dict({"input_ids": ids, "labels": ids}))
    found: np.ndarray[Any, Any] = pyarrow.compute.list_value_length(filled.data.column("input_ids")).to_numpy()
    return found


def count_steps(lengths: np.ndarray[Any, Any], args: SFTConfig, endless: bool = False) -> Steps:
    """The steps of a run over rows of these lengths.

    Args:
        endless: the rows are the beginning of a stream.
    """
    batch, batches = args.per_device_train_batch_size, args.gradient_accumulation_steps
    per_step = batch * batches * max(1, args.world_size)
    an_epoch = max(1, math.ceil(math.ceil(len(lengths) / (batch * max(1, args.world_size))) / batches))
    count = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * an_epoch)
    rows = count * per_step if endless else round(count / an_epoch * len(lengths))
    mean = float(lengths.mean())
    return Steps(
        count, len(lengths), batches, round(rows * mean), _largest(lengths, batch, count * batches), mean * batch
    )


def _largest(lengths: np.ndarray[Any, Any], batch: int, batches: int) -> int:
    """Tokens of the largest of so many micro-batches, on average over orders of the rows."""
    if len(lengths) <= batch:
        return int(lengths.sum())
    found = []
    for seed in range(EPOCHS_DRAWN):
        order = np.random.default_rng(seed).permutation(lengths)
        sums = np.add.reduceat(order, range(0, len(order), batch))
        found.append(sums[:batches].max())
    return round(float(np.mean(found)))


def sample_batch(lengths: Sequence[int] | np.ndarray[Any, Any], batch: int) -> list[int]:
    """Places of rows that make a micro-batch with about the mean's tokens."""
    mean = float(np.mean(lengths)) * min(batch, len(lengths))
    draws = [np.random.default_rng(seed).permutation(len(lengths))[:batch] for seed in range(64)]
    best = min(draws, key=lambda places: abs(float(np.asarray(lengths)[places].sum()) - mean))
    return [int(place) for place in best]
