"""The best checkpoint, and when to stop: by the loss, or by any metric that an evaluation counts."""

from __future__ import annotations

import dataclasses
import difflib
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from phinetune.config.run import CustomMetric, EvaluationSection, RunConfig
from phinetune.errors import ConfigError
from phinetune.measures import MEASURES, measures_of
from phinetune.training.settings import Settings

SCORED = ("loss", "perplexity", "token_accuracy")  # known at every evaluation; the rest has to be answered for
PREFIX = "eval_"


def settle_best(settings: Settings, config: RunConfig) -> Settings:
    """The settings with `metric_for_best_model` as it is logged, and which way it is better.

    Raises:
        ConfigError: a metric that no evaluation counts, or early stopping without evaluations.
    """
    section, training = config.evaluation, dict(settings.training)
    problems = []
    if section.early_stopping_patience:
        training.setdefault("metric_for_best_model", "loss")
        if str(training.get("eval_strategy") or "no") == "no" or config.data.eval is None:
            problems.append(
                "evaluation.early_stopping_patience: there is no evaluation to go by; set data.eval and "
                "training_config.eval_strategy (steps or epoch)"
            )
    name = best_metric(training)
    if name:
        known = [*SCORED, *answer_metrics(section)]
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean `{near[0]}`?" if near else ""
            problems.append(
                f"training_config.metric_for_best_model: no evaluation counts `{name}`{hint} (there are "
                f"{', '.join(known)}; evaluation.metrics names those of answers)"
            )
        else:
            less = [m.name for m in section.metrics if isinstance(m, CustomMetric) and m.less_is_better]
            training.setdefault("greater_is_better", measures_of([name], less)[0].more_is_better)
    if problems:
        raise ConfigError(problems)
    return dataclasses.replace(settings, training=training)


def best_metric(training: dict[str, Any]) -> str | None:
    """The metric that the best checkpoint is chosen by, without transformers' prefix."""
    name = training.get("metric_for_best_model")
    return str(name).removeprefix(PREFIX) if name else None


def answer_metrics(section: EvaluationSection) -> list[str]:
    """What is counted of answers."""
    own = [one if isinstance(one, str) else one.name for one in section.metrics]
    always = [m.key for m in MEASURES if m.key in ("stopped", "repeating")]
    return [*own, *always] if section.generate else []


def needs_answers(settings: Settings, section: EvaluationSection) -> bool:
    """Whether every evaluation has to let the model answer the held-out prompts."""
    chosen = best_metric(settings.training)
    return section.generate and (section.metrics_while_training or (chosen is not None and chosen not in SCORED))


class EarlyStop(TrainerCallback):
    """Stops once `patience` evaluations in a row were no better than the best before them, by `threshold`.

    Counted from the evaluations that the state has kept, so a resumed run stops where an unbroken one does.
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
