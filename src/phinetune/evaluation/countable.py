"""Whether a run's held-out chats can give the metric by which the run chooses its best checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from phinetune.config.evaluation import EvaluationSection
from phinetune.errors import ConfigError
from phinetune.evaluation.answering import Question
from phinetune.evaluation.metrics import RowMetric
from phinetune.metric_table import METRICS

KEY = "training_config.metric_for_best_model"


def check_countable(name: str, metrics: Mapping[str, RowMetric], questions: Sequence[Question]) -> None:
    """Make sure that an evaluation will have a number for a metric of answers.

    A metric of this package has a number for a row or not by the row's reference alone. So the references are tried
    as their own answers. Functions of the user's are not called for this.

    Args:
        metrics: see `phinetune.evaluation.metrics.row_metrics`.
        questions: see `phinetune.evaluation.answering.questions_of`.

    Raises:
        ConfigError: no held-out chat gives a number.
    """
    if not questions:
        raise ConfigError(
            f"{KEY}: `{name}` is counted from answers, and the held-out rows are no chats that could be answered; take "
            "loss, or hold out chats"
        )
    if name not in METRICS:
        return
    if not _has_numbers(metrics[name], questions):
        raise ConfigError(
            f"{KEY}: `{name}` has no number for any of the {len(questions)} held-out chats that are answered, since "
            "their own answers hold no JSON; take another metric, or hold out chats that have some"
        )


def names_metrics(section: EvaluationSection) -> bool:
    """Whether the user named metrics of answers, and there will be answers."""
    return section.generate and section.metrics != list(METRICS)


def without_numbers(metrics: Mapping[str, RowMetric], questions: Sequence[Question]) -> list[str]:
    """A line for each metric of this package that was named and for which no held-out chat gives a number.

    Args:
        metrics: see `phinetune.evaluation.metrics.row_metrics`.
        questions: see `phinetune.evaluation.answering.questions_of`.
    """
    return [
        f"evaluation.metrics: `{name}` has no number for any of the {len(questions)} held-out chats that are answered, "
        "since their own answers hold no JSON"
        for name, metric in metrics.items()
        if name in METRICS and questions and not _has_numbers(metric, questions)
    ]


def _has_numbers(metric: RowMetric, questions: Sequence[Question]) -> bool:
    return any(metric(one.reference, one.reference, one.messages) is not None for one in questions)
