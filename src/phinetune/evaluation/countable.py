"""Whether a run's held-out chats can give the metrics that were named, and the one that chooses its best checkpoint."""

from __future__ import annotations

from collections.abc import Sequence

from phinetune.config.evaluation import EvaluationSection
from phinetune.errors import ConfigError, DataError
from phinetune.evaluation.answering import Question
from phinetune.evaluation.classes import Classes
from phinetune.evaluation.metrics import Metrics, RowMetric
from phinetune.evaluation.set_metrics import SetMetric
from phinetune.metric_table import METRICS

KEY = "training_config.metric_for_best_model"


def check_countable(name: str, metrics: Metrics, questions: Sequence[Question]) -> None:
    """Make sure that an evaluation will have a number for a metric of answers.

    A metric of this package has a number for a row or not by the row's reference alone. So the references are tried
    as their own answers. Functions of the user's are not called for this.

    Args:
        metrics: see `phinetune.evaluation.metrics.open_metrics`.
        questions: see `phinetune.evaluation.answering.questions_of`.

    Raises:
        ConfigError: no held-out chat gives a number.
    """
    if not questions:
        raise ConfigError(
            f"{KEY}: `{name}` is counted from answers, and the held-out rows are no chats that could be answered; take "
            "loss, or hold out chats"
        )
    metric = metrics.get(name)
    if name not in METRICS or metric is None or isinstance(metric, SetMetric):
        return
    if not _has_numbers(metric, questions):
        raise ConfigError(
            f"{KEY}: `{name}` has no number for any of the {len(questions)} held-out chats that are answered, since "
            "their own answers hold no JSON; take another metric, or hold out chats that have some"
        )


def names_metrics(section: EvaluationSection) -> bool:
    """Whether the user named metrics of answers, and there will be answers."""
    return section.generate and section.metrics != list(METRICS)


def without_numbers(metrics: Metrics, questions: Sequence[Question]) -> list[str]:
    """A line for each metric of this package that was named and lacks numbers of held-out chats: of them all, or for
    SQL of some.

    Args:
        metrics: see `phinetune.evaluation.metrics.open_metrics`.
        questions: see `phinetune.evaluation.answering.questions_of`.
    """
    lines = []
    for name, metric in metrics.items():
        if isinstance(metric, SetMetric) or not questions:
            continue
        if name in METRICS and not _has_numbers(metric, questions):
            lines.append(
                f"evaluation.metrics: `{name}` has no number for any of the {len(questions)} held-out chats that are "
                "answered, since their own answers hold no JSON"
            )
        if getattr(metric, "runs_references", False):
            lines += _not_running(name, metric, questions)
    return lines


def _not_running(name: str, metric: RowMetric, questions: Sequence[Question]) -> list[str]:
    places = [i for i, one in enumerate(questions, 1) if metric(one.reference, one.reference, one.messages) is None]
    if not places:
        return []
    text = questions[places[0] - 1].reference
    return [
        f"evaluation.metrics: `{name}` leaves out {len(places)} of {len(questions)} held-out prompts, since SQLite "
        f"can't run their own query on the tables that it finds; the first is prompt {places[0]}, {text[:60]!r}"
    ]


def check_classes(metrics: Metrics, questions: Sequence[Question]) -> None:
    """Make sure that the answers of the held-out chats are labels, for each metric that sorts answers into classes.

    Raises:
        DataError: some are not, or there are too many labels.
    """
    problems: list[str] = []
    for name, metric in metrics.items():
        if isinstance(metric, SetMetric) and isinstance(metric.function, Classes) and questions:
            problems += metric.function.problems([one.reference for one in questions], name)
    if problems:
        raise DataError(problems)


def sorts(metrics: Metrics) -> bool:
    """Whether a metric sorts answers into classes."""
    return any(isinstance(one, SetMetric) and isinstance(one.function, Classes) for one in metrics.values())


def _has_numbers(metric: RowMetric, questions: Sequence[Question]) -> bool:
    return any(metric(one.reference, one.reference, one.messages) is not None for one in questions)
