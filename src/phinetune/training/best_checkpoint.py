"""Chooses the best checkpoint and stops a run early: by the loss, or by any metric that an evaluation counts."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from phinetune.config.evaluation import EvaluationSection
from phinetune.config.judge import JudgeMetric
from phinetune.config.run import RunConfig
from phinetune.errors import ConfigError, RunError
from phinetune.metric_table import keys_of, measures_of
from phinetune.training.objectives.objective import Objective
from phinetune.training.settings import Settings
from phinetune.training.value_rules import plain_name

PREFIX = "eval_"
WATCHING = ("greedy", "reduce_lr_on_plateau")  # schedules that follow the losses, or the best checkpoint's metric
OTHER_NAMES = {"mean_token_accuracy": "token_accuracy"}  # TRL's name, and ours


def settle_best(settings: Settings, config: RunConfig, objective: Objective) -> Settings:
    """The settings with the metric for the best checkpoint and for early stopping, and with `greater_is_better`.

    Raises:
        ConfigError: no evaluation counts the metric, or the run is to stop early but has no evaluations.
    """
    section, training = config.evaluation, dict(settings.training)
    problems = _without_held_out(training, config)
    notes = [*settings.notes, *_idle_direction(training, section), *_idle_evaluation(training, section)]
    if section.early_stopping_patience:
        training.setdefault("metric_for_best_model", "loss")
        if not _evaluates(training) or config.data.eval is None:
            problems.append(
                "evaluation.early_stopping_patience: there is no evaluation to go by; set data.eval and "
                "training_config.eval_strategy (to steps or epoch)"
            )
    name = best_metric(training)
    if name in OTHER_NAMES:
        notes.append(f"training_config: `metric_for_best_model: {name}` is taken as `{OTHER_NAMES[name]}`")
        name = training["metric_for_best_model"] = OTHER_NAMES[name]
    if name:
        if not _evaluates(training):
            notes.append("training_config: `metric_for_best_model` has no effect: `eval_strategy` is `no`")
        problems += _not_counted(name, [*objective.metrics, *answer_metrics(section)], section)
        direction = measures_of([name], [*section.less_is_better([name]), *objective.less_is_better])[0]
        training.setdefault("greater_is_better", direction.more_is_better)
    if problems:
        raise ConfigError(problems)
    return dataclasses.replace(settings, training=training, notes=notes)


def _idle_direction(training: dict[str, Any], section: EvaluationSection) -> list[str]:
    """A line for `greater_is_better` where no metric is compared."""
    if training.get("greater_is_better") is None:
        return []
    if not _evaluates(training):
        return ["training_config: `greater_is_better` has no effect: `eval_strategy` is `no`"]
    by_loss = training.get("load_best_model_at_end") or plain_name(training.get("lr_scheduler_type")) in WATCHING
    if best_metric(training) or by_loss or section.early_stopping_patience:
        return []
    return ["training_config: `greater_is_better` has no effect: `metric_for_best_model` is not set"]


def _idle_evaluation(training: dict[str, Any], section: EvaluationSection) -> list[str]:
    """A line for each key of `evaluation` that asks for something during training and gets nothing."""
    found = {}
    if section.early_stopping_threshold and not section.early_stopping_patience:
        found["early_stopping_threshold"] = "`early_stopping_patience` is not set"
    default = EvaluationSection.model_fields["fixed_prompts"].default
    asked = {
        "metrics_while_training": section.metrics_while_training,
        "fixed_prompts": section.fixed_prompts and section.fixed_prompts != default,
    }
    why = None if _evaluates(training) or training.get("eval_on_start") else "training_config.eval_strategy is `no`"
    if why and section.rows_while_training != "auto":
        found["rows_while_training"] = why
    why = why or (None if section.generate else "`generate` is false")
    found |= {key: why for key, is_asked in asked.items() if is_asked and why}
    return [f"evaluation: `{key}` has no effect: {reason}" for key, reason in found.items()]


def _not_counted(name: str, known: list[str], section: EvaluationSection) -> list[str]:
    """The problem of a metric that no evaluation counts."""
    if name in known or (section.generate and any(one.gives(name) for one in section.own)):
        return []
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean `{near[0]}`?" if near else ""
    return [
        f"training_config.metric_for_best_model: no evaluation counts `{name}`{hint} (there are {', '.join(known)}; "
        "evaluation.metrics names those of answers)"
    ]


def _evaluates(training: dict[str, Any]) -> bool:
    return plain_name(training.get("eval_strategy") or "no") != "no"


def _without_held_out(training: dict[str, Any], config: RunConfig) -> list[str]:
    """The problems of a run that is to be evaluated and has nothing held out."""
    if config.data.eval is not None:
        return []
    asked = [("eval_strategy", _evaluates(training)), ("eval_on_start", bool(training.get("eval_on_start")))]
    return [
        f"training_config.{key}: there are no held-out chats to score; set data.eval (a share such as 0.1, or a file)"
        for key, is_asked in asked
        if is_asked
    ]


def best_metric(training: dict[str, Any]) -> str | None:
    """The metric by which the best checkpoint is chosen, without transformers' prefix; None if there is none."""
    name = training.get("metric_for_best_model")
    return str(name).removeprefix(PREFIX) if name else None


def check_counted(chosen: str | None, metrics: Mapping[str, float]) -> None:
    """Make sure that an evaluation has the metric by which the best checkpoint is chosen.

    Only a function that returns several numbers can lack it: their names are not known before it is called.

    Raises:
        RunError: it has not.
    """
    name = str(chosen).removeprefix(PREFIX)
    if chosen and name not in metrics:
        raise RunError(
            f"training_config.metric_for_best_model: this evaluation has no `{name}`; it has {', '.join(metrics)}"
        )


def answer_metrics(section: EvaluationSection) -> list[str]:
    """The names of the metrics that are counted from answers."""
    named = [[one] if isinstance(one, str) else one.keys for one in section.metrics if not isinstance(one, JudgeMetric)]
    own = [key for keys in named for key in keys]
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
        if self.has_stopped(args, state):
            control.should_training_stop = True

    def has_stopped(self, args: TrainingArguments, state: TrainerState) -> bool:
        """Whether the evaluations up to here stop the run."""
        key = PREFIX + str(args.metric_for_best_model).removeprefix(PREFIX)
        sign = 1.0 if args.greater_is_better else -1.0
        best, waited = None, 0
        for value in (sign * entry[key] for entry in state.log_history if key in entry):
            waited = 0 if best is None or value > best + self.threshold else waited + 1
            best = value if best is None else max(best, value)
        self.stopped = waited >= self.patience
        return self.stopped
