"""What a model that is being trained answers at each evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from phinetune.chat.encoder import ChatEncoder
from phinetune.config.run import EvaluationSection
from phinetune.data.prepare.build import ChatSet
from phinetune.evaluation.answering import Question, answer_all, questions_of
from phinetune.evaluation.metrics import RowMetric, row_metrics

Sample = dict[str, Any]


@dataclass(frozen=True)
class WhileTraining:
    """Called with the model, it gives the metrics' means and the answers to the fixed prompts.

    Attributes:
        questions: held-out prompts to answer for the metrics; empty where none are counted.
        fixed: prompts whose answers are kept.
    """

    tokenizer: PreTrainedTokenizerBase
    section: EvaluationSection
    metrics: Mapping[str, RowMetric]
    questions: Sequence[Question]
    fixed: Sequence[Question]

    def __call__(self, model: Any) -> tuple[dict[str, float], list[Sample]]:
        """Every question is answered once. A sample: `prompt`, `reference` (of held-out ones), `answer`, `stopped`."""
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
    counted: bool,
) -> WhileTraining:
    """What to ask at each evaluation.

    Args:
        counted: let the model answer all held-out prompts, for the metrics.
    """
    there = questions_of(encoder, held_out, section.max_prompts) if held_out and section.generate else []
    wanted = section.fixed_prompts if section.generate else 0
    fixed = there[:wanted] if isinstance(wanted, int) else [_question(encoder, text) for text in wanted]
    return WhileTraining(tokenizer, section, row_metrics(section), there if counted else [], fixed)


def _question(encoder: ChatEncoder, text: str) -> Question:
    chat = encoder.prepare([{"role": "user", "content": text}])
    return Question(encoder.prompt_ids(chat), chat, text, "", -1)
