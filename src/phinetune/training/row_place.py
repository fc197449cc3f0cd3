"""The place of a run among its rows: which row comes next, and how many steps are left from there."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch.utils.data import Sampler
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


@dataclass(frozen=True)
class Stretch:
    """A part of a run in which all steps have the same size.

    Attributes:
        step, epoch, row: where it begins: after so many steps and epochs, and after so many rows of the next epoch.
        batch: rows that all processes take together in one micro-batch.
        accumulation: micro-batches in a step.
        drop_last: whether rows that fill no micro-batch are left out.
    """

    step: int
    epoch: int
    row: int
    batch: int
    accumulation: int
    drop_last: bool = False

    @property
    def step_rows(self) -> int:
        """The rows of a whole step."""
        return self.batch * self.accumulation

    def steps_of(self, rows: int) -> int:
        """The steps that so many rows of an epoch give."""
        batches = rows // self.batch if self.drop_last else math.ceil(rows / self.batch)
        return math.ceil(batches / self.accumulation)

    def place_at(self, step: int, rows: int) -> tuple[int, int]:
        """The whole epochs that are done after `step`, and the rows that are done of the next one.

        Args:
            rows: of an epoch.
        """
        taken, rest = step - self.step, self.steps_of(rows - self.row)
        if taken < rest:
            return self.epoch, self.row + taken * self.step_rows
        epochs, steps = divmod(taken - rest, max(1, self.steps_of(rows)))
        return self.epoch + 1 + epochs, steps * self.step_rows

    def last_step(self, rows: int, epochs: float) -> int:
        """The last step of a run of so many epochs with so many rows."""
        if epochs < self.epoch + 1:
            left = max(0, math.ceil((epochs - self.epoch) * rows) - self.row)
            return self.step + math.ceil(left / self.step_rows)
        more = math.ceil((epochs - self.epoch - 1) * max(1, self.steps_of(rows)))
        return self.step + self.steps_of(rows - self.row) + more


class RowsFrom(Sampler[int]):
    """The rows of another sampler without the first ones."""

    def __init__(self, sampler: Any, first: int) -> None:
        self.sampler, self.first = sampler, first

    def __iter__(self) -> Iterator[int]:
        for number, row in enumerate(self.sampler):
            if number >= self.first:
                yield row

    def __len__(self) -> int:
        return len(self.sampler) - self.first

    def set_epoch(self, epoch: int) -> None:
        """Let the other sampler draw the rows of this epoch."""
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(epoch)


class PartOfAnEpoch(TrainerCallback):
    """Counts an epoch that was entered in its middle from there, not from its beginning."""

    def __init__(self, epoch: int, done: float) -> None:
        self.epoch, self.done = epoch, done

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        part = float(state.epoch or 0) - self.epoch
        state.epoch = round(self.epoch + self.done + part * (1 - self.done), 9)
