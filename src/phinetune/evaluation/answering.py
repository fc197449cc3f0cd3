"""Held-out prompts, what a model answers to them, and how good each answer is."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from phinetune.chat.encoder import ChatEncoder
from phinetune.chat.template import Message
from phinetune.config.run import EvaluationSection
from phinetune.data.prepare.build import ChatSet
from phinetune.engine.generate import Answer, answer_prompts
from phinetune.evaluation.bootstrap import Array
from phinetune.evaluation.metrics import RowMetric
from phinetune.evaluation.patterns import repeats


@dataclass(frozen=True)
class Question:
    """The turns before a held-out chat's last answer.

    Attributes:
        ids: as the model reads them.
        prompt: the last user turn.
        reference: the answer that the chat has.
        row: the chat's place in its set.
    """

    ids: list[int]
    messages: list[Message]
    prompt: str
    reference: str
    row: int


@dataclass(frozen=True)
class Answers:
    """A model's answers to all questions, and by metric each answer's number: NaN where it says nothing of a row."""

    answers: list[Answer]
    numbers: dict[str, Array]

    def means(self, chosen: Sequence[int] | None = None) -> dict[str, float]:
        """Of each metric the mean over (some of) the answers; metrics that say nothing of any are left out."""
        found = {}
        for name, numbers in self.numbers.items():
            picked = numbers if chosen is None else numbers[list(chosen)]
            picked = picked[~np.isnan(picked)]
            if len(picked):
                found[name] = float(picked.mean())
        return found

    def of(self, place: int) -> dict[str, float]:
        """The numbers of one answer."""
        return {name: float(row[place]) for name, row in self.numbers.items() if not math.isnan(row[place])}


def questions_of(encoder: ChatEncoder, held_out: ChatSet, limit: int | None) -> list[Question]:
    """The turns before the last answer of each chat, for the first `limit` chats."""
    questions = []
    for chat, row in list(zip(held_out.chats, held_out.places, strict=True))[:limit]:
        last = max(i for i, message in enumerate(chat) if message["role"] == "assistant")
        asked = next((m["content"] for m in reversed(chat[:last]) if m["role"] == "user"), "")
        reference = chat[last]["content"] or ""  # a turn may be nothing but a tool call
        questions.append(Question(encoder.prompt_ids(chat[:last]), chat[:last], asked or "", reference, row))
    return questions


def answer_all(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    section: EvaluationSection,
    metrics: Mapping[str, RowMetric],
    on_done: Callable[[int], None] = lambda count: None,
) -> Answers:
    """Let the model answer; mark each answer by the metrics, and whether it stopped and whether it goes in circles."""
    answers = answer_prompts(
        model,
        tokenizer,
        [question.ids for question in questions],
        max_new_tokens=section.max_new_tokens,
        batch_size=None if section.batch_size == "auto" else section.batch_size,
        on_done=on_done,
    )
    pairs = list(zip(answers, questions, strict=True))
    numbers = {
        name: _array([metric(a.text, q.reference, q.messages) for a, q in pairs]) for name, metric in metrics.items()
    }
    numbers["stopped"] = _array([100.0 * a.stopped for a in answers])
    numbers["repeating"] = _array([100.0 * repeats(a.text, q.reference) for a, q in pairs])
    return Answers(answers, numbers)


def _array(values: Sequence[float | None]) -> Array:
    return np.array([math.nan if value is None else value for value in values], dtype=np.float64)
