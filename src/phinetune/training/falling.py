"""A warning for runs that learn a preference by making the chosen answers unlikely too."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

logger = logging.getLogger(__name__)


class FallingWarning(TrainerCallback):
    """Says once, in plain words, when chosen answers become less likely while their lead over the rejected ones grows.

    Preferences are learnt by the difference alone. A model may learn it by making both answers unlikely, and then says
    something else than either.
    """

    LINES = 3  # logged lines whose means are compared
    FALL = 0.05  # of the first mean, that counts as a fall

    def __init__(self) -> None:
        self.told = False

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.told or not state.is_world_process_zero:
            return
        seen = [entry for entry in state.log_history if {"logps/chosen", "rewards/margins"} <= entry.keys()]
        if len(seen) < 2 * self.LINES:
            return
        first, last = seen[: self.LINES], seen[-self.LINES :]
        before, now = (_mean_of(part, "logps/chosen") for part in (first, last))
        grown = _mean_of(last, "rewards/margins") > max(0.0, _mean_of(first, "rewards/margins"))
        if grown and now < before - self.FALL * abs(before):
            self.told = True
            logger.warning(
                "step %d: the chosen answers have become less likely (log-probability %.1f at first, now %.1f) while "
                "their lead over the rejected ones grows; the model may come to say neither. A larger objective.beta, "
                "a smaller learning rate, or `sft` among objective.loss_type (dpo) holds them up",
                state.global_step,
                before,
                now,
            )


def _mean_of(entries: Sequence[dict[str, Any]], name: str) -> float:
    return sum(float(entry[name]) for entry in entries) / len(entries)
