"""The log-probabilities of a set's answers by the reference, computed once before the first step and kept on disk.

The reference is the model as it stands when the run starts: the base under a new adapter, or the base with the adapter
that the run goes on from. No second model is ever in memory.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset

from phinetune import processes
from phinetune.data.prepare.cache import cache_key, cached_folder, find_cached
from phinetune.engine.packing import PackedCollator
from phinetune.training.prepare import PreparedRun
from phinetune.training.recorded import HELD_OUT_ROWS, STARTING_ADAPTER, TRAIN_ROWS, WEIGHTS, Record
from phinetune.training.reference_parts import Parts, read_numbers, write_numbers

logger = logging.getLogger(__name__)

Numbers = np.ndarray[Any, np.dtype[np.float32]]
OnDone = Callable[[int, int], None]  # rows done, and all

TOKENS = 8192  # of a packed row of the reference; nothing is kept for a backward, so it takes little memory
# The keys of a run's record that say what the model is when the run starts, but for those of places.
DECIDES = ("model.", "peft_config.", "versions.", "training_config.seed")
PLACES = ("model.path", "model.tokenizer", "model.adapter", "model.use_cache", "versions.trl")
BY_CONTENT = (WEIGHTS, STARTING_ADAPTER)


@dataclass(frozen=True)
class Reference:
    """Adds the reference's log-probabilities to a run's rows, where its objective needs them.

    Attributes:
        record: what decides the run's result.
        on_done: is told how many rows are done, and how many there are.
        seconds: what it took, for each set.
    """

    prepared: PreparedRun
    record: Record
    on_done: OnDone
    seconds: list[float] = field(default_factory=list)

    def added(self, model: PeftModel, train: Any, held_out: Any) -> tuple[Any, Any]:
        """Both sets as the trainer takes them.

        Args:
            model: with its adapter as the run starts with it.
        """
        objective = self.prepared.objective
        args, longest = self.prepared.args, self.prepared.settings.max_length
        train = objective.arranged(train, args.train_batch_size, longest)
        held_out = None if held_out is None else objective.arranged(held_out, args.eval_batch_size, longest)
        if not objective.reference:
            return train, held_out
        sets = ((train, TRAIN_ROWS), (held_out, HELD_OUT_ROWS))
        return tuple(one if one is None else self._with(model, one, name) for one, name in sets)  # type: ignore[return-value]

    def _with(self, model: PeftModel, rows: Any, name: str) -> RowsWith:
        prepared, fast = self.prepared, self.prepared.engine.fast
        assert fast
        decides = {
            "rows": self.record[name],
            "arranged": prepared.objective.arrangement(rows),
            "weights": {key: value for key, value in self.record.items() if key in BY_CONTENT or _decides(key)},
            "share": fast.share,
        }
        collate = fast.collator(model.config)
        columns, began = prepared.objective.reference, time.perf_counter()
        made = with_reference(model, rows, columns, collate, decides, prepared.tokenizer, self.on_done)
        self.seconds.append(time.perf_counter() - began)
        return made


def _decides(key: str) -> bool:
    return key.startswith(DECIDES) and key not in PLACES


class RowsWith(TorchDataset[dict[str, Any]]):
    """The rows of a set with more columns of numbers, which are kept beside it.

    Args:
        rows: the set, as the trainer takes it.
        numbers: shape (rows, columns).
    """

    def __init__(self, rows: Any, columns: Sequence[str], numbers: Numbers) -> None:
        self.rows, self.columns, self.numbers = rows, tuple(columns), numbers

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: int) -> dict[str, Any]:
        own = dict(zip(self.columns, self.numbers[place].tolist(), strict=True))
        return {**self.rows[place], **own}


def with_reference(
    model: Any,
    rows: Any,
    columns: Sequence[str],
    collate: PackedCollator,
    decides: Mapping[str, Any],
    tokenizer: Any,
    on_done: OnDone = lambda done, total: None,
) -> RowsWith:
    """The rows with the log-probability of each of their conversations by `model` as it is now.

    They are read from disk where the same were computed before, even in part. All processes of the run share the work.

    Args:
        model: with its adapter as the run starts with it.
        columns: their names, one for each conversation of a row.
        collate: makes packed rows.
        decides: what the numbers depend on, as JSON holds it: the rows and the weights by their content.
        tokenizer: the run's.
    """
    key = cache_key({"reference": dict(decides), "columns": list(columns)}, tokenizer)
    entry = find_cached(key)
    if processes.any_of(entry is None):
        parts = Parts(key, len(rows), len(columns))
        numbers = _computed(model, rows, parts, collate, on_done)
        with processes.main_first():
            entry = cached_folder(key, lambda folder: write_numbers(folder, numbers))
        parts.drop()
    else:
        logger.info("the reference's log-probabilities were computed before: %s", entry)
    assert entry
    return RowsWith(rows, columns, read_numbers(entry, len(columns)))


@torch.no_grad()
def _computed(model: Any, rows: Any, parts: Parts, collate: PackedCollator, on_done: OnDone) -> Tensor:
    """The numbers of all rows, shape (rows, columns). Each process computes every n-th packed row."""
    began, training = time.perf_counter(), model.training
    model.eval()
    found, done = torch.zeros_like(parts.found), 0
    plain = PackedCollator(share=collate.share, rope_limit=collate.rope_limit, owned=True)
    try:
        for number, places in enumerate(batches(rows)):
            if number % processes.count() == processes.rank():
                if not parts.knows(places):
                    parts.found[places] = _numbers(model, plain([rows[place] for place in places]), len(places))
                    parts.keep()
                found[places] = parts.found[places]
            done += len(places)
            on_done(done, len(rows))
    except BaseException:  # a second Ctrl-C, say
        parts.keep(now=True)
        raise
    model.train(training)
    found = processes.summed(found)  # a row has numbers in one process and zeros in the others
    seconds = time.perf_counter() - began
    logger.info("the reference's log-probabilities of %s rows: computed in %.1f s", f"{len(rows):,}", seconds)
    return found


def _numbers(model: Any, packed: Mapping[str, Tensor], rows: int) -> Tensor:
    device = next(model.parameters()).device
    out = model(**{name: tensor.to(device) for name, tensor in packed.items()})
    log_probs: Tensor = out.log_probs
    return log_probs.view(rows, -1).float().cpu()


def batches(rows: Any) -> Iterator[list[int]]:
    """The places of the rows of each packed row: those that begin alike together, up to `TOKENS` tokens."""
    order: Sequence[int] = range(len(rows))
    if not isinstance(rows, Dataset) or "length" not in rows.column_names:  # rows in memory
        order = sorted(order, key=lambda place: list(rows[place]["input_ids"]))
    batch: list[int] = []
    tokens = 0
    for place in order:
        length = len(rows[place]["input_ids"])
        if batch and tokens + length > TOKENS:
            yield batch
            batch, tokens = [], 0
        batch.append(place)
        tokens += length
    if batch:
        yield batch
