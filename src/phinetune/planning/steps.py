"""The steps of a run: how many, and how many tokens each takes, from the lengths of its rows alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.compute
from accelerate.data_loader import SeedableRandomSampler
from datasets import Dataset
from trl import SFTConfig

from phinetune.data.prepare.build import ChatSet
from phinetune.engine.choice import Engine


@dataclass(frozen=True)
class Steps:
    """The optimizer steps of a run.

    Attributes:
        rows: what a micro-batch is made of: chats, or rows filled with several.
        batches: micro-batches a step, on one process.
        tokens: of all steps.
        largest: tokens of the largest micro-batch.
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
    """The steps of a run over rows of these lengths, drawn in the order that the run will draw them in.

    Args:
        endless: the rows are the beginning of a stream.
    """
    batch, batches = args.per_device_train_batch_size, args.gradient_accumulation_steps
    processes = max(1, args.world_size)
    an_epoch = max(1, math.ceil(math.ceil(len(lengths) / (batch * processes)) / batches))
    count = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * an_epoch)
    mean = float(lengths.mean()) * batch
    if endless:
        tokens, own = round(count * batches * processes * mean), _sums(lengths, batch)
    else:
        drawn = _drawn(lengths, args, count, an_epoch)
        tokens, own = int(drawn.sum()), drawn[::processes]
    return Steps(count, len(lengths), batches, tokens, int(own.max()), mean)


def _drawn(lengths: np.ndarray[Any, Any], args: SFTConfig, count: int, an_epoch: int) -> np.ndarray[Any, Any]:
    """Tokens of each micro-batch of `count` steps, of which an epoch has `an_epoch`; the processes take turns.

    transformers draws rows by this sampler of accelerate's, from the run's seed.
    """
    sampler = SeedableRandomSampler(
        range(len(lengths)), data_seed=args.seed if args.data_seed is None else args.data_seed
    )
    found = []
    for done in range(0, count, an_epoch):
        sums = _sums(lengths[list(sampler)], args.per_device_train_batch_size)
        part = (count - done) * args.gradient_accumulation_steps * max(1, args.world_size)
        found.append(sums if count - done >= an_epoch else sums[:part])
    return np.concatenate(found)


def _sums(lengths: np.ndarray[Any, Any], batch: int) -> np.ndarray[Any, Any]:
    """Tokens of micro-batches of rows in this order."""
    sums: np.ndarray[Any, Any] = np.add.reduceat(lengths, range(0, len(lengths), batch))
    return sums


def sample_batch(lengths: Sequence[int] | np.ndarray[Any, Any], batch: int) -> list[int]:
    """Places of rows that make a micro-batch with about the mean's tokens."""
    mean = float(np.mean(lengths)) * min(batch, len(lengths))
    draws = [np.random.default_rng(seed).permutation(len(lengths))[:batch] for seed in range(64)]
    best = min(draws, key=lambda places: abs(float(np.asarray(lengths)[places].sum()) - mean))
    return [int(place) for place in best]
