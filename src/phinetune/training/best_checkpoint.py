"""Chooses the best checkpoint and stops a run early: by the loss, or by any metric that an evaluation counts."""

from __future__ import annotations

import dataclasses
import difflib
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from phinetune.config.evaluation import CustomMetric, EvaluationSection
from phinetune.config.run import RunConfig
from phinetune.errors import ConfigError
from phinetune.metric_table import keys_of, measures_of
from phinetune.training.objectives.objective import Objective
from phinetune.training.settings import Settings

PREFIX = "eval_"


def settle_best(settings: Settings, config: RunConfig, objective: Objective) -> Settings:
    """The settings with the metric for the best checkpoint and for early stopping, and with `greater_is_better`.

    Raises:
        ConfigError: no evaluation counts the metric, or the run is to stop early but has no evaluations.
    """
    section, training = config.evaluation, dict(settings.training)
    problems = []
    if section.early_stopping_patience:
        training.setdefault("metric_for_best_model", "loss")
        if str(training.get("eval_strategy") or "no") == "no" or config.data.eval is None:
            problems.append(
                "evaluation.early_stopping_patience: there is no evaluation to go by; set data.eval and "
                "training_config.eval_strategy (to steps or epoch)"
            )
    name = best_metric(training)
    if name:
        known = [*objective.metrics, *answer_metrics(section)]
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean `{near[0]}`?" if near else ""
            problems.append(
                f"training_config.metric_for_best_model: no evaluation counts `{name}`{hint} (there are "
                f"{', '.join(known)}; evaluation.metrics names those of answers)"
            )
        else:
            own = [m.name for m in section.metrics if isinstance(m, CustomMetric) and m.less_is_better]
            less = [*own, *objective.less_is_better]
            training.setdefault("greater_is_better", measures_of([name], less)[0].more_is_better)
    if problems:
        raise ConfigError(problems)
    return dataclasses.replace(settings, training=training)


def best_metric(training: dict[str, Any]) -> str | None:
    """The metric by which the best checkpoint is chosen, without transformers' prefix; None if there is none."""
    name = training.get("metric_for_best_model")
    return str(name).removeprefix(PREFIX) if name else None


def answer_metrics(section: EvaluationSection) -> list[str]:
    """The names of the metrics that are counted from answers."""
    own = [one if isinstance(one, str) else one.name for one in section.metrics]
    return [*own, *keys_of("answer")] if section.generate else []


def needs_answers(settings: Settings, section: EvaluationSection, objective: Objective) -> bool:
    """Whether the model has to answer the held-out prompts at every evaluation."""
    chosen = best_metric(settings.training)
    by_answers = chosen is not None and chosen not in objective.metrics
    return section.generate and (section.metrics_while_training or by_answers)


class EarlyStop(TrainerCallback):
    """Stops the run after `patience` evaluations in a row that were not better than the best one before.

    An evaluation must be better by more than `threshold`. The evaluations are counted from the trainer's state, so a
    resumed run stops at the same step as one that was never interrupted.
    """

    def __init__(self, patience: int, threshold: float) -> None:
        self.patience, self.threshold = patience, threshold
        self.stopped = False

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        key = PREFIX + str(args.metric_for_best_model).removeprefix(PREFIX)
        sign = 1.0 if args.greater_is_better else -1.0
        best, waited = None, 0
        for value in (sign * entry[key] for entry in state.log_history if key in entry):
            waited = 0 if best is None or value > best + self.threshold else waited + 1
            best = value if best is None else max(best, value)
        if waited >= self.patience:
            self.stopped = control.should_training_stop = True
