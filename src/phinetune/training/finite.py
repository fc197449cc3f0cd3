"""Keeps numbers that are not finite out of the adapter: gradients before they are applied, tensors before a save."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from phinetune import processes
from phinetune.config.engine import EngineSection
from phinetune.errors import RunError

logger = logging.getLogger(__name__)

SHOWN_ROWS = 4  # rows of the step whose beginnings a sentence shows
SHOWN_TOKENS = 24  # of each
SHOWN_TENSORS = 3
REMEDIES = "Try a lower learning_rate, or bf16 in place of fp16"


class NotFiniteError(RunError):
    """A loss, a gradient or an adapter is not finite, so the run stopped."""


class FiniteSteps(TrainerCallback):
    """Looks at each step's losses and gradients before they are applied.

    A step with a number that is not finite stops the run, or is skipped: it counts as a step, and changes nothing.
    Of several processes all decide alike. Loss scaling (fp16) skips steps by itself while it looks for its scale.

    Attributes:
        skipped: the steps that were skipped, of the run before a resume as well.
    """

    def __init__(self, engine: EngineSection, begins: Callable[[torch.Tensor], str]) -> None:
        """Make one for a run.

        Args:
            begins: how a row's tokens are shown.
        """
        self.skips, self.limit, self.begins = engine.on_nonfinite == "skip", engine.nonfinite_limit, begins
        self.skipped: list[int] = []
        self._rows: list[torch.Tensor] = []
        self._loss: float | None = None  # the first of the step that is not finite
        self._norm = 0.0

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._rows, self._loss, self._norm = [], None, 0.0

    def saw(self, inputs: Mapping[str, Any], loss: torch.Tensor) -> None:
        """Take a micro-batch and its loss. If that is not finite, its rows are the ones to show."""
        bad = not bool(torch.isfinite(loss))
        if self._loss is None and bad:
            self._rows, self._loss = _rows_of(inputs), float(loss)
        elif self._loss is None and len(self._rows) < SHOWN_ROWS:
            self._rows += _rows_of(inputs)

    def measured(self, norm: torch.Tensor | float | None) -> None:
        """Take the norm of the step's gradients; None where a library that takes the step itself tells none."""
        self._norm = 0.0 if norm is None else float(norm)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        if not processes.any_of(self._loss is not None or not math.isfinite(self._norm)):
            return
        step = state.global_step + 1
        if args.fp16 and args.device.type == "cuda" and self._loss is None:
            return  # the loss scaler notices by itself, and applies nothing
        self.skipped.append(step)
        found = f"the gradients' norm became {self._norm}" if self._loss is None else f"the loss became {self._loss}"
        if args.deepspeed:
            told = f"{found} at step {step}, which DeepSpeed has applied, so the run stopped"
            raise NotFiniteError(self._told(told, may_skip=False))
        if not self.skips:
            raise NotFiniteError(self._told(f"{found} at step {step}, so nothing was applied and the run stopped"))
        check_finite(model, f"before step {step}", self._told)
        if len(self.skipped) > self.limit:
            raise NotFiniteError(
                self._told(
                    f"{found} at step {step}; {len(self.skipped)} steps had to be skipped, and "
                    f"engine.nonfinite_limit is {self.limit}, so the run stopped"
                )
            )
        logger.warning("%s at step %d, so the step is skipped", found, step)
        model.zero_grad()  # the optimizer leaves out what has no gradient

    def check_saved(self, model: torch.nn.Module, step: int) -> None:
        """Make sure that the adapter may be saved.

        Raises:
            RunError: it holds a number that is not finite.
        """
        check_finite(model, f"after step {step}", self._told)

    def _told(self, found: str, may_skip: bool = True) -> str:
        starts = " | ".join(repr(self.begins(row[:SHOWN_TOKENS])) for row in self._rows[:SHOWN_ROWS])
        skip = "" if self.skips or not may_skip else "; engine.on_nonfinite: skip leaves such steps out"
        rows = f". The step's rows began: {starts}" if starts else ""
        return f"{found}; earlier checkpoints are kept. {REMEDIES}{skip}{rows}"


def _rows_of(inputs: Mapping[str, Any]) -> list[torch.Tensor]:
    """The tokens of the rows of a micro-batch; of a packed row those of its conversations, or of their beginnings."""
    ids = inputs["input_ids"]
    if "segments" not in inputs:
        return list(ids)
    return [ids[0, start:stop] for start, stop, parent in inputs["segments"].tolist() if parent < 0]


def check_finite(model: torch.nn.Module, when: str, told: Callable[[str], str] = str) -> None:
    """Make sure that what trains in a model is finite.

    Args:
        when: the place in the run, for the sentence.
        told: makes the whole sentence of what was found.

    Raises:
        RunError: a tensor that trains holds a number that is not finite.
    """
    trained = [(name, tensor) for name, tensor in model.named_parameters() if tensor.requires_grad]
    if all(bool(torch.isfinite(tensor.detach().sum())) for _, tensor in trained):  # a sum is the cheapest look
        return
    bad = [name for name, tensor in trained if not bool(torch.isfinite(tensor.detach()).all())]
    if bad:
        more = f" and {len(bad) - SHOWN_TENSORS} more" if len(bad) > SHOWN_TENSORS else ""
        names = ", ".join(bad[:SHOWN_TENSORS])
        raise NotFiniteError(told(f"the adapter is not finite {when} ({names}{more}), so it was not saved"))
