"""Lets a model answer prompts at each evaluation during training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from phinetune.chats.encoder import ChatEncoder
from phinetune.config.evaluation import EvaluationSection
from phinetune.data.prepare.chat_sets import ChatSet
from phinetune.evaluation.answering import Question, answer_all, fixed_question, questions_of
from phinetune.evaluation.metrics import Metrics
from phinetune.evaluation.preferences import worth_imitating

Sample = dict[str, Any]


@dataclass(frozen=True)
class WhileTraining:
    """Called with the model, returns the means of the metrics and the answers to the fixed prompts.

    Attributes:
        questions: the held-out prompts to answer for the metrics; empty if no metrics are counted.
        fixed: the prompts whose answers are kept.
    """

    tokenizer: PreTrainedTokenizerBase
    section: EvaluationSection
    metrics: Metrics
    questions: Sequence[Question]
    fixed: Sequence[Question]

    def __call__(self, model: Any) -> tuple[dict[str, float], list[Sample]]:
        """Let the model answer every prompt once.

        Returns:
            the means by metric, and for each fixed prompt a sample with the keys `prompt`, `answer`, `stopped` and, if
            the prompt is a held-out one, `reference`.
        """
        more = [question for question in self.fixed if question not in self.questions]
        asked = [*self.questions, *more]
        if not asked:
            return {}, []
        answered = answer_all(model, self.tokenizer, asked, self.section, self.metrics if self.questions else {})
        means = answered.means(range(len(self.questions))) if self.questions else {}
        samples = []
        for question in self.fixed:
            answer = answered.answers[asked.index(question)]
            sample = {"prompt": question.prompt, "answer": answer.text, "stopped": answer.stopped}
            samples.append({**sample, **({"reference": question.reference} if question.row >= 0 else {})})
        return means, samples


def while_training(
    tokenizer: PreTrainedTokenizerBase,
    encoder: ChatEncoder,
    held_out: ChatSet | None,
    section: EvaluationSection,
    metrics: Metrics,
    counted: bool,
) -> WhileTraining:
    """Choose what the model answers at each evaluation.

    Args:
        metrics: see `phinetune.evaluation.metrics.open_metrics`.
        counted: whether the model answers all held-out prompts, so that the metrics can be counted.
    """
    held_out = worth_imitating(held_out) if held_out else None
    questions = questions_of(encoder, held_out, section.max_prompts) if held_out and section.generate else []
    prompts = section.fixed_prompts if section.generate else 0
    fixed = questions[:prompts] if isinstance(prompts, int) else [fixed_question(encoder, text) for text in prompts]
    return WhileTraining(tokenizer, section, metrics, questions if counted else [], fixed)
