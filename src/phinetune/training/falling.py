"""A warning for runs that learn a preference by making the chosen answers unlikely too."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from phinetune.training.objectives.objective import Objective

logger = logging.getLogger(__name__)


class FallingWarning(TrainerCallback):
    """Says once, in plain words, when chosen answers become less likely while their lead over the rejected ones grows.

    Preferences are learnt by the difference alone. A model may learn it by making both answers unlikely, and then says
    something else than either.
    """

    LINES = 3  # logged lines whose means are compared
    FALL = 0.05  # of the log-probability at first, that counts as a fall

    def __init__(self, objective: Objective) -> None:
        self.objective, self.told = objective, False

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.told or not state.is_world_process_zero:
            return
        seen = [entry for entry in state.log_history if {"logps/chosen", "rewards/margins"} <= entry.keys()]
        if len(seen) < 2 * self.LINES:
            return
        first, last = seen[: self.LINES], seen[-self.LINES :]
        before, now = (_mean([float(entry["rewards/margins"]) for entry in part]) for part in (first, last))
        fall, size = self._fall(first, last)
        if now > max(0.0, before) and fall > self.FALL * size:
            self.told = True
            logger.warning(
                "step %d: the chosen answers have become less likely (their log-probability has fallen by %.0f%%) "
                "while their lead over the rejected ones grows; the model may come to say neither. A larger "
                "objective.beta, a smaller learning rate, or `sft` among objective.loss_type (dpo) holds them up",
                state.global_step,
                100 * fall / size,
            )

    def _fall(self, first: Sequence[dict[str, Any]], last: Sequence[dict[str, Any]]) -> tuple[float, float]:
        """By how much chosen answers have become less likely, and how likely they were; 0 where lines are mixed.

        Lines are of other rows, of which some are harder. So each of the last lines has to lie below all first ones.
        """
        found = [[self.objective.chosen_likelihood(entry) for entry in part] for part in (first, last)]
        before, now = ([one for one in part if one] for part in found)
        if not before or not now or max(now)[0] >= min(before)[0]:
            return 0.0, 0.0
        return _mean([one for one, _ in before]) - _mean([one for one, _ in now]), _mean([size for _, size in before])


def _mean(numbers: Sequence[float]) -> float:
    return sum(numbers) / len(numbers)
