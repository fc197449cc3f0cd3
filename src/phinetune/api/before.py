"""What would stop a run after its preparation, looked at by `train` and `plan` alike before a weight is loaded."""

from __future__ import annotations

import logging

from phinetune import processes
from phinetune.engine.generate import check_prompts
from phinetune.errors import ModelError
from phinetune.evaluation.answering import fixed_question, questions_of
from phinetune.evaluation.countable import check_classes, check_countable, names_metrics, sorts, without_numbers
from phinetune.evaluation.judge import check_judges
from phinetune.evaluation.kept import neutral_sets
from phinetune.evaluation.metrics import Metrics, open_metrics
from phinetune.evaluation.preferences import worth_imitating
from phinetune.exporting.hub.push import check_can_push
from phinetune.training.best_checkpoint import best_metric
from phinetune.training.prepare import PreparedRun, SettledRun

logger = logging.getLogger(__name__)


def look_at_settings(settled: SettledRun) -> Metrics:
    """The metrics of answers, where they and the push at the end can be had.

    Raises:
        PhinetuneError: a metric can't be had, a judge's key is missing, a set of neutral chats can't be read, or the
            run could not be pushed.
    """
    if settled.settings.push:
        try:
            check_can_push(settled.settings.push.token)
        except ModelError as error:
            raise ModelError([f"training_config.push_to_hub: {problem}" for problem in error.problems]) from error
    check_judges(settled.config.evaluation)
    if settled.config.evaluation.enabled:
        neutral_sets(settled.config.evaluation)
    return open_metrics(settled.config.evaluation)


def look_at_rows(prepared: PreparedRun, metrics: Metrics) -> None:
    """Make sure that the held-out rows give the metric of the best checkpoint, and that fixed prompts can be answered.

    A line in the log tells of each metric that the user named and that will have no number.

    Raises:
        PhinetuneError: they don't, or a fixed prompt is too long for the model.
    """
    encoder, section = prepared.rows.encoder, prepared.config.evaluation
    fixed = section.fixed_prompts
    if isinstance(fixed, list):
        questions = [fixed_question(encoder, text) for text in fixed]
        check_prompts([question.ids for question in questions], prepared.shape.max_position_embeddings)
    name, held_out = best_metric(prepared.settings.training), prepared.chats.held_out
    counted = name if name and name not in prepared.objective.metrics else None
    told = processes.is_main() and names_metrics(section)
    for chats in filter(None, (held_out, prepared.chats.test)):
        counts, tells = counted if chats is held_out else None, told and chats is prepared.chats.measured
        if not (counts or tells or sorts(metrics)):
            continue
        questions = questions_of(encoder, worth_imitating(chats), section.max_prompts)
        if counts:
            check_countable(counts, metrics, questions)
        if section.generate:
            check_classes(metrics, questions)
        for line in without_numbers(metrics, questions) if tells else ():
            logger.warning(line)
