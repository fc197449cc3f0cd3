"""Notices steps whose loss stands far above those before them, and keeps the rows that caused it."""

from __future__ import annotations

import json
import os
import statistics
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from phinetune.data.prepare.chat_sets import ChatSet
from phinetune.engine.examples import IGNORED
from phinetune.files import PRIVATE
from phinetune.training.callbacks import drop_lines_after

FACTOR = 2.0  # a spike is so many times the median of the steps before it
LEAST = 1.0  # and so far above it, in nats
BEFORE = 20  # steps that the median is taken of
FEWEST = 8  # before that many steps nothing is usual yet
SHOWN_ROWS = 4
AROUND = 16  # tokens shown on each side of the place where a row's trained part begins
MOST = 20  # spikes that are kept


class SpikeWatch(TrainerCallback):
    """Appends to `spikes.jsonl` each step with a spike: its loss, what was usual, and its rows as texts, with their
    `places` (file and line) as far as they are known.

    Of several processes the main one writes what it saw itself. When a run is resumed, lines after the checkpoint are
    deleted, because those steps are done again.
    """

    def __init__(
        self,
        path: Path,
        decoded: Callable[[torch.Tensor], str],
        placed: Callable[[Sequence[int]], str | None] = lambda ids: None,
    ) -> None:
        self.path, self.decoded, self.placed = path, decoded, placed
        self._before: deque[float] = deque(maxlen=BEFORE)
        self._inputs: list[Mapping[str, Any]] = []
        self._loss, self._found = 0.0, 0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.is_world_process_zero:
            drop_lines_after(self.path, state.global_step)

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._inputs, self._loss = [], 0.0

    def saw(self, inputs: Mapping[str, Any], loss: torch.Tensor) -> None:
        """Take a micro-batch, and its part of the step's loss."""
        self._inputs.append(inputs)
        self._loss += float(loss)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        usual = statistics.median(self._before) if len(self._before) >= FEWEST else None
        if usual is not None and is_spike(self._loss, usual) and self._found < MOST and state.is_world_process_zero:
            self._found += 1
            shown = [one for inputs in self._inputs for one in self._shown(inputs)][:SHOWN_ROWS]
            rows, places = [text for text, _ in shown], [self.placed(tokens) for _, tokens in shown]
            entry = {"step": state.global_step, "loss": self._loss, "usual": usual, "rows": rows, "places": places}
            self._append(entry)
        self._before.append(self._loss)
        self._inputs = []

    def _shown(self, inputs: Mapping[str, Any]) -> Iterator[tuple[str, list[int]]]:
        for tokens, at in trained_places(inputs):
            yield self.decoded(tokens[max(0, at - AROUND) : at + AROUND]), tokens.tolist()

    def _append(self, entry: dict[str, Any]) -> None:
        self.path.touch(PRIVATE)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())


def is_spike(loss: float, usual: float) -> bool:
    """Whether a step's loss stands far above the usual one. One that is not finite has a stop of its own."""
    return usual + LEAST < loss < float("inf") and loss > FACTOR * usual


def trained_places(inputs: Mapping[str, Any]) -> Iterator[tuple[torch.Tensor, int]]:
    """For each row of a micro-batch its own tokens, and the place among them where the trained part begins.

    Of rows of a packed row that share a beginning, their own tokens are those after it.
    """
    ids = inputs["input_ids"]
    if "segments" not in inputs:
        mask = inputs.get("attention_mask", torch.ones_like(ids)).bool()
        for row, labels in ((one[real], own[real]) for one, own, real in zip(ids, inputs["labels"], mask, strict=True)):
            trained = (labels != IGNORED).nonzero()
            yield row, int(trained[0]) if len(trained) else 0
        return
    segments, predicts = inputs["segments"].tolist(), inputs["predicts"]
    shared = {parent for *_, parent in segments}
    for number, (start, stop, _) in enumerate(segments):
        if number not in shared:
            own = predicts[(predicts >= start) & (predicts < stop)]
            yield ids[0, start:stop], int(own.min()) + 1 - start if len(own) else 0


def place_of(chats: ChatSet, tokens: Sequence[int]) -> str | None:
    """Where a row stands, by its tokens or, if its beginning is shared with other rows, by those at its end.

    Returns:
        its file and line, of equal rows the first one's with their number; None where places are not known.
    """
    found = [
        where
        for row, where in zip(chats.encoded if chats.where else (), chats.where, strict=True)
        if row.input_ids[-len(tokens) :] == tokens
    ]
    equal = list(dict.fromkeys(found))
    more = f" and {len(equal) - 1} more" if len(equal) > 1 else ""
    return f"{equal[0]}{more}" if equal else None
