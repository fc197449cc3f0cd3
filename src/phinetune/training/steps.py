"""Counts the steps of a run and their tokens. The lengths of the rows are enough for that."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.compute
from accelerate.data_loader import SeedableRandomSampler
from datasets import Dataset
from trl import SFTConfig

from phinetune.data.prepare.chat_sets import ChatSet
from phinetune.engine.fast_engine import FastEngine
from phinetune.errors import ConfigError
from phinetune.training.balance import WithinSteps, step_shape

DRAWN = 5_000_000  # rows that are drawn to count tokens; the epochs after them are counted like them


@dataclass(frozen=True)
class Steps:
    """The optimizer steps of a run.

    Attributes:
        count: how many steps there are.
        rows: how many rows micro-batches are made of. A row is a chat, or is filled with several chats.
        batches: how many micro-batches each process computes in a step.
        tokens: the tokens of all steps together.
        largest: the tokens of the largest micro-batch.
        mean: the mean number of tokens of a micro-batch.
    """

    count: int
    rows: int
    batches: int
    tokens: int
    largest: int
    mean: float


def row_lengths(chats: ChatSet, engine: FastEngine | None) -> np.ndarray[Any, Any]:
    """The number of tokens of each row that micro-batches are made of, shape (rows).

    Args:
        engine: the fast engine, which may fill rows with several chats; None is the plain engine.
    """
    lengths = chats.lengths()
    if engine is None or not engine.fill:
        return lengths
    # Filling depends on nothing but lengths, so rows of zeros with the same lengths are filled in the same way.
    ids = [[0] * int(n) for n in lengths]
    filled = engine.prepare(Dataset.from_dict({"input_ids": ids, "labels": ids}))
    tokens: np.ndarray[Any, Any] = pyarrow.compute.list_value_length(filled.data.column("input_ids")).to_numpy()
    return tokens


def count_steps(lengths: np.ndarray[Any, Any], args: SFTConfig, endless: bool = False, dealt: bool = False) -> Steps:
    """Count the steps of a run, with the rows in the order in which the run will draw them.

    Args:
        lengths: the number of tokens of each row, shape (rows).
        endless: whether the rows are only the beginning of a stream.
        dealt: whether several processes get a step's rows by their tokens, see `phinetune.training.balance`.
    """
    batch, batches = args.per_device_train_batch_size, args.gradient_accumulation_steps
    processes = max(1, args.world_size)
    per_epoch = max(1, -(-_batches(lengths, args) // batches))
    count = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * per_epoch)
    if endless:
        mean = float(lengths.mean()) * batch
        tokens, own = round(count * batches * processes * mean), _sums(lengths, batch)
    else:
        mean = float(lengths.mean()) * min(batch, len(lengths))
        most = max(1, DRAWN // len(lengths)) * per_epoch
        drawn = _drawn(lengths, args, min(count, most), per_epoch, dealt)
        tokens, own = int(drawn.sum()) * count // min(count, most), drawn[::processes]
    return Steps(count, len(lengths), batches, tokens, int(own.max(initial=0)), mean)


def check_full_batch(lengths: np.ndarray[Any, Any], args: SFTConfig) -> None:
    """Make sure that there is a micro-batch where those that are not full are dropped.

    Args:
        lengths: the number of tokens of each row, shape (rows).

    Raises:
        ConfigError: the rows fill none.
    """
    if not _batches(lengths, args):
        raise ConfigError(
            f"training_config.dataloader_drop_last: {len(lengths)} rows fill no micro-batch of "
            f"{args.per_device_train_batch_size}, so nothing would be trained; set per_device_train_batch_size lower"
        )


def _batches(lengths: np.ndarray[Any, Any], args: SFTConfig) -> int:
    """The number of micro-batches that each process takes in an epoch."""
    together: int = args.per_device_train_batch_size * max(1, args.world_size)
    return len(lengths) // together if args.dataloader_drop_last else -(-len(lengths) // together)


def _drawn(
    lengths: np.ndarray[Any, Any], args: SFTConfig, count: int, per_epoch: int, dealt: bool
) -> np.ndarray[Any, Any]:
    """The number of tokens of each micro-batch in `count` steps. The processes take micro-batches in turn.

    transformers draws rows with the same sampler of accelerate, from the run's seed.

    Args:
        per_epoch: how many steps an epoch has.
        dealt: see `count_steps`.
    """
    sampler: Any = SeedableRandomSampler(
        range(len(lengths)), data_seed=args.seed if args.data_seed is None else args.data_seed
    )
    if dealt and args.world_size > 1:
        sampler = WithinSteps(sampler, lengths, step_shape(args))
    epochs = []
    for done in range(0, count, per_epoch):
        sums = _sums(lengths[list(sampler)], args.per_device_train_batch_size)
        if args.dataloader_drop_last:
            sums = sums[: _batches(lengths, args) * max(1, args.world_size)]
        part = (count - done) * args.gradient_accumulation_steps * max(1, args.world_size)
        epochs.append(sums if count - done >= per_epoch else sums[:part])
    return np.concatenate(epochs)


def _sums(lengths: np.ndarray[Any, Any], batch: int) -> np.ndarray[Any, Any]:
    """The number of tokens of each micro-batch of `batch` rows, with the rows in this order."""
    sums: np.ndarray[Any, Any] = np.add.reduceat(lengths, range(0, len(lengths), batch))
    return sums
