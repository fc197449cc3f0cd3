"""Lets a model answer held-out prompts, and measures how good each answer is."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from phinetune.chats.encoder import ChatEncoder
from phinetune.chats.tagged_text import PLAIN
from phinetune.chats.template import Message
from phinetune.config.evaluation import EvaluationSection
from phinetune.data.prepare.chat_sets import ChatSet
from phinetune.engine.generate import Answer
from phinetune.errors import ConfigError, RunError
from phinetune.evaluation.bootstrap import Array
from phinetune.evaluation.metrics import Metrics, RowMetric
from phinetune.evaluation.patterns import repeats
from phinetune.evaluation.set_metrics import Counted, Judged, SetMetric, timed
from phinetune.evaluation.together import answer_together


@dataclass(frozen=True)
class Question:
    """The turns before the last answer of a held-out chat.

    Attributes:
        ids: their token ids, followed by the header of the answer.
        messages: the turns.
        prompt: the last user turn.
        reference: the chat's own answer.
        row: the index of the chat's row in its set; -1 for a prompt that comes from the configuration.
    """

    ids: list[int]
    messages: list[Message]
    prompt: str
    reference: str
    row: int


@dataclass(frozen=True)
class Answers:
    """A model's answers to all questions.

    Attributes:
        numbers: by metric the number of each answer, shape (answers). NaN: the metric has no number for this answer.
        judged: the answers with their references and messages.
        sets: the metrics that are counted from all answers at once.
    """

    answers: list[Answer]
    numbers: dict[str, Array]
    judged: Judged = field(default_factory=lambda: Judged([], [], []))
    sets: Sequence[SetMetric] = ()

    @cached_property
    def whole(self) -> list[Counted]:
        """What each of `sets` gives for all answers.

        Raises:
            RunError: one of them failed.
        """
        return [timed(metric, self.judged) for metric in self.sets if self.answers]

    def means(self, chosen: Sequence[int] | None = None) -> dict[str, float]:
        """The mean of each metric, and what each metric over the set gives. Metrics without a number are left out.

        Args:
            chosen: indexes of the answers that count; None is all.

        Raises:
            RunError: a metric over the set failed.
        """
        means = self.row_means(chosen)
        if chosen is None:
            return means | {key: value for one in self.whole for key, value in one.numbers.items()}
        for metric in self.sets if len(chosen) else ():
            means |= metric(self.judged.at(chosen))
        return means

    def row_means(self, chosen: Sequence[int] | None = None) -> dict[str, float]:
        """The mean of each metric that has a number an answer. Args: see `means`."""
        means = {}
        for name, numbers in self.numbers.items():
            picked = numbers if chosen is None else numbers[list(chosen)]
            picked = picked[~np.isnan(picked)]
            if len(picked):
                means[name] = float(picked.mean())
        return means

    def of(self, place: int) -> dict[str, float]:
        """The numbers of the answer at index `place`, by metric."""
        return {name: float(row[place]) for name, row in self.numbers.items() if not math.isnan(row[place])}


def questions_of(encoder: ChatEncoder, held_out: ChatSet, limit: int | None) -> list[Question]:
    """The question of each held-out chat, for the first `limit` chats (None: all)."""
    questions = []
    for chat, row in list(zip(held_out.chats, held_out.places, strict=True))[:limit]:
        last = max(i for i, message in enumerate(chat) if message["role"] == "assistant")
        reference = chat[last]["content"] or ""  # a turn may consist of a tool call alone
        questions.append(question_of(encoder, chat[:last], reference, row))
    return questions


def question_of(encoder: ChatEncoder, messages: Sequence[Message], reference: str = "", row: int = -1) -> Question:
    """The question of some turns. The prompt of a ready-made text stands in it as a user's message."""
    ids = encoder.prompt_ids(messages)
    turns: list[Message] = [{**m, "role": "user"} if m["role"] == PLAIN else m for m in messages]
    asked = next((m["content"] for m in reversed(turns) if m["role"] == "user"), "")
    return Question(ids, turns, asked or "", reference, row)


def fixed_question(encoder: ChatEncoder, text: str) -> Question:
    """The question of a prompt that the configuration names: a user's message, or a text up to where its answer begins.

    Raises:
        ConfigError: texts have their answers behind a tag, and this one does not end with it.
    """
    if encoder.tags is None:
        return question_of(encoder, encoder.prepare([{"role": "user", "content": text}]))
    prompt = encoder.tags.prompt(text)
    if prompt is None:
        raise ConfigError(
            f"evaluation.fixed_prompts: {text[:60]!r} does not end with {encoder.tags.response!r} (data.response); "
            "write it as the texts are, up to where the answer begins"
        )
    return question_of(encoder, prompt)


def answer_all(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    section: EvaluationSection,
    metrics: Metrics,
    on_done: Callable[[int], None] = lambda count: None,
) -> Answers:
    """Let the model answer all questions, and compute numbers for each answer.

    Args:
        metrics: see `phinetune.evaluation.metrics.open_metrics`. `stopped` and `repeating` are always added: 100 if the
            answer ended by itself, and 100 if it repeats itself; else 0.
        on_done: called with the number of answers that have just ended.

    Raises:
        RunError: a metric's function failed on an answer.
    """
    answers = answer_together(
        model,
        tokenizer,
        [question.ids for question in questions],
        max_new_tokens=section.max_new_tokens,
        batch_size=None if section.batch_size == "auto" else section.batch_size,
        on_done=on_done,
    )
    pairs = list(zip(answers, questions, strict=True))
    judged = Judged([a.text for a in answers], [q.reference for q in questions], [q.messages for q in questions])
    numbers = {name: _row_numbers(one, judged) for name, one in metrics.items() if not isinstance(one, SetMetric)}
    numbers["stopped"] = _array([100.0 * a.stopped for a in answers])
    numbers["repeating"] = _array([100.0 * repeats(a.text, q.reference) for a, q in pairs])
    return Answers(answers, numbers, judged, [one for one in metrics.values() if isinstance(one, SetMetric)])


def _row_numbers(metric: RowMetric, judged: Judged) -> Array:
    """The number of each answer.

    Raises:
        RunError: the metric failed on an answer; the error says which.
    """
    values = []
    for place, (answer, reference, messages) in enumerate(
        zip(judged.answers, judged.references, judged.messages, strict=True), 1
    ):
        try:
            values.append(metric(answer, reference, messages))
        except RunError as error:
            raise RunError(f"{error} (held-out prompt {place})") from error
    return _array(values)


def _array(values: Sequence[float | None]) -> Array:
    return np.array([math.nan if value is None else value for value in values], dtype=np.float64)
