"""Compares the base model with the tuned model on the same held-out chats."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import numpy as np
from transformers import PreTrainedTokenizerBase

from phinetune.chats.encoder import ChatEncoder
from phinetune.config.evaluation import CustomMetric, EvaluationSection
from phinetune.data.prepare.chat_sets import ChatSet
from phinetune.data.prepare.shared_rows import shared_sentences
from phinetune.engine.scoring import Score, score_rows
from phinetune.evaluation.answering import Answers, Question, answer_all, questions_of
from phinetune.evaluation.bootstrap import Array, Difference, Pairs, differences
from phinetune.evaluation.json_answers import field_shares
from phinetune.evaluation.metrics import RowMetric
from phinetune.evaluation.preferences import answer_words, are_pairs, score_pairs, win_rate
from phinetune.metric_table import measures_of

FLAGGED = 10.0  # percent; if so many answers don't stop or repeat themselves, a sentence says so

Numbers = dict[str, Any]
Side = Callable[[], contextlib.AbstractContextManager[Any]]  # gives one of the models that are compared


@dataclass(frozen=True)
class Example:
    """One held-out prompt with its answers.

    Attributes:
        prompt: the last user turn.
        reference: the chat's own answer.
        answers: the answer of each model (`base`, `tuned`).
        scores: by model the numbers of its answer, by metric.
    """

    prompt: str
    reference: str
    answers: dict[str, str]
    scores: dict[str, dict[str, float]]


@dataclass(frozen=True)
class Comparison:
    """The result of a comparison. Models are called `base` and `tuned`.

    Attributes:
        results: by model: the loss (nats per labelled token), the perplexity, `token_accuracy` and shares in percent,
            the mean of every metric over the rows, and the counts `labelled_tokens` and `prompts`.
        examples: every answered prompt.
        differences: by measure: tuned minus base, with its 95% interval; empty if there is only one model.
        by_tag: by value of the tag column: how many `rows` have it, and by model the same numbers as in `results`.
        json_fields: by model and by field: the percentage of answers in which the field is right; empty if no reference
            is JSON.
        flags: sentences about what the user should look at.
        data: what became of the held-out rows, as in results.json.
        overlap: how many of them were trained on, as in results.json; None if that was not looked at.
        win_rate: how often the tuned model's answer is the better one, see `preferences.win_rate`; None if not asked.
    """

    results: dict[str, Numbers]
    examples: list[Example]
    differences: dict[str, Difference] = field(default_factory=dict)
    by_tag: dict[str, Numbers] = field(default_factory=dict)
    json_fields: dict[str, dict[str, float]] = field(default_factory=dict)
    flags: list[str] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)
    overlap: dict[str, Any] | None = None
    win_rate: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Numbers]:
        """`results` for the key `evaluation` of results.json. JSON has no infinity, so null replaces it."""
        return {name: _finite(numbers) for name, numbers in self.results.items()}

    def to_tree(self, examples: int | None = None) -> dict[str, Any]:
        """Everything but `data` and `overlap`, with the keys of results.json and `phinetune evaluate --out`.

        Args:
            examples: how many of the examples, from the first; None is all.
        """
        return {
            "evaluation": self.to_dict(),
            "differences": {key: _finite(difference.to_dict()) for key, difference in self.differences.items()},
            "by_tag": {tag: _finite(numbers) for tag, numbers in self.by_tag.items()},
            "json_fields": self.json_fields,
            "flags": self.flags,
            **({"win_rate": self.win_rate} if self.win_rate else {}),
            "examples": [asdict(example) for example in self.examples[:examples]],
        }


def _finite(tree: Numbers) -> Numbers:
    return {
        key: _finite(value)
        if isinstance(value, dict)
        else None
        if isinstance(value, float) and not math.isfinite(value)
        else value
        for key, value in tree.items()
    }


@dataclass(frozen=True)
class _Side:
    """One model's scores, row by row, and its answers, prompt by prompt."""

    scores: list[Score]
    answered: Answers
    preferred: Mapping[str, Array] = field(default_factory=dict)  # of held-out pairs, row by row

    def numbers(self, rows: Sequence[int] | None = None, prompts: Sequence[int] | None = None) -> Numbers:
        """The numbers over some rows and prompts; None is all of them."""
        score = sum((self.scores[i] for i in rows) if rows is not None else self.scores, Score())
        return {
            "loss": score.loss,
            "perplexity": score.perplexity,
            "token_accuracy": 100 * score.token_accuracy,
            **{name: _mean(values, rows) for name, values in self.preferred.items()},
            "labelled_tokens": score.tokens,
            "prompts": len(self.answered.answers if prompts is None else prompts),
            **({"answer_words": answer_words(self.answered, prompts)} if self.preferred else {}),
            **self.answered.means(prompts),
        }


def _mean(values: Array, rows: Sequence[int] | None) -> float:
    return float(np.mean(values if rows is None else values[list(rows)]))


class Watcher(Protocol):
    """Gets told how far a comparison is."""

    def begin(self, chats: int, prompts: int, sides: Sequence[str]) -> None:
        """The comparison begins. Each side scores this number of chats and answers this number of prompts."""

    def side(self, name: str) -> None:
        """The side `base` or `tuned` begins."""

    def advance(self, count: int) -> None:
        """`count` more chats have been scored, or prompts answered."""


class _Unwatched:
    def begin(self, chats: int, prompts: int, sides: Sequence[str]) -> None: ...
    def side(self, name: str) -> None: ...
    def advance(self, count: int) -> None: ...


def compare(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    encoder: ChatEncoder,
    held_out: ChatSet,
    section: EvaluationSection,
    metrics: Mapping[str, RowMetric],
    watcher: Watcher | None = None,
    base: Side | None = None,
) -> Comparison:
    """Score the held-out chats and let the model answer their prompts, without and with its adapter.

    A model without an adapter is `base`, and there is no `tuned`.

    Args:
        metrics: what `phinetune.evaluation.metrics.row_metrics` returned for the section.
        watcher: gets told how far the comparison is.
        base: gives the base, as `phinetune.checkpoints.untouched` does. None: it is the model without its adapter,
            which holds for every adapter that left its base as it was.

    Raises:
        RunError: a metric's function failed on an answer.
    """
    watcher = watcher or _Unwatched()
    questions = questions_of(encoder, held_out, section.max_prompts) if section.generate else []
    models = sides_of(model, base)
    model.eval()
    sides: dict[str, _Side] = {}
    watcher.begin(len(held_out), len(questions), list(models))
    size = None if section.batch_size == "auto" else section.batch_size
    pairs = are_pairs(held_out.encoded)
    for name, opened in models.items():
        watcher.side(name)
        with opened() as one:
            preferred: dict[str, Array] = {}
            if pairs:
                scores, preferred = score_pairs(one, held_out.encoded, size, watcher.advance)
            else:
                scores = score_rows(one, held_out.encoded, size, watcher.advance)
            answered = Answers([], {})
            if questions:
                answered = answer_all(one, tokenizer, questions, section, metrics, watcher.advance)
        sides[name] = _Side(scores, answered, preferred)
    return _compared(sides, questions, held_out, section)


def sides_of(model: Any, base: Side | None = None) -> dict[str, Side]:
    """How to get each model of a comparison: `base`, and `tuned` if `model` has an adapter.

    Args:
        base: see `compare`.
    """
    if not hasattr(model, "disable_adapter"):
        return {"base": lambda: contextlib.nullcontext(model)}
    return {"base": base or (lambda: _switched_off(model)), "tuned": lambda: contextlib.nullcontext(model)}


@contextlib.contextmanager
def _switched_off(model: Any) -> Iterator[Any]:
    with model.disable_adapter():
        yield model


def _compared(
    sides: dict[str, _Side], questions: Sequence[Question], held_out: ChatSet, section: EvaluationSection
) -> Comparison:
    results = {name: side.numbers() for name, side in sides.items()}
    overlap = held_out.shared.to_dict() if held_out.shared else None
    unlooked = [held_out.not_compared] if held_out.not_compared else []
    texts = {name: [answer.text for answer in side.answered.answers] for name, side in sides.items()}
    references = [question.reference for question in questions]
    fields = {name: field_shares(zip(answers, references, strict=True)) for name, answers in texts.items()}
    examples = [
        Example(
            question.prompt,
            question.reference,
            {name: answers[i] for name, answers in texts.items()},
            {name: side.answered.of(i) for name, side in sides.items()},
        )
        for i, question in enumerate(questions)
    ]
    return Comparison(
        results,
        examples,
        _differences(sides, section) if len(sides) == 2 else {},
        _by_tag(sides, questions, held_out.tags),
        fields if any(fields.values()) else {},
        [
            *shared_sentences(overlap or {}),
            *unlooked,
            *_not_finite(results),
            *_flags(results, section.max_new_tokens),
        ],
        held_out.report.to_dict(),
        overlap,
        _won(sides, section),
    )


def _won(sides: Mapping[str, _Side], section: EvaluationSection) -> dict[str, Any] | None:
    by = section.win_rate_by
    if by is None or len(sides) < 2:
        return None
    less = [one.name for one in section.metrics if isinstance(one, CustomMetric) and one.less_is_better]
    more_is_better = measures_of([by], less)[0].more_is_better
    return win_rate(by, sides["base"].answered, sides["tuned"].answered, more_is_better)


def _differences(sides: Mapping[str, _Side], section: EvaluationSection) -> dict[str, Difference]:
    """The difference of both models in every measure: of loss and tokens over rows, of answers over prompts."""
    base, tuned = sides["base"], sides["tuned"]
    less_is_better = [
        metric.name for metric in section.metrics if isinstance(metric, CustomMetric) and metric.less_is_better
    ]

    def per_token(name: str, factor: float = 1.0, exponential: bool = False) -> Pairs:
        def column(side: _Side, name: str) -> np.ndarray[Any, np.dtype[np.float64]]:
            return np.array([getattr(score, name) for score in side.scores], dtype=np.float64)

        sums, tokens = ((column(base, key), column(tuned, key)) for key in (name, "tokens"))
        return Pairs(factor * sums[0], factor * sums[1], tokens[0], tokens[1], exponential)

    def mean(name: str) -> Pairs:
        before, after = base.answered.numbers[name], tuned.answered.numbers[name]
        in_both = ~np.isnan(before + after)  # the comparison is paired, so both models must have a number
        weights = in_both.astype(np.float64)
        return Pairs(np.where(in_both, before, 0.0), np.where(in_both, after, 0.0), weights, weights)

    ones = np.ones(len(base.scores))
    scored = {
        "loss": per_token("nll"),
        "perplexity": per_token("nll", exponential=True),
        "token_accuracy": per_token("correct", 100.0),
        **{name: Pairs(base.preferred[name], tuned.preferred[name], ones, ones) for name in tuned.preferred},
    }
    answered = {name: both for name in tuned.answered.means() if (both := mean(name)).base_weights.any()}
    by_measure: dict[str, Difference] = {}
    for pairs, rows in ((scored, len(base.scores)), (answered, len(base.answered.answers))):
        measures = measures_of(list(pairs), less_is_better)
        by_measure |= differences({measure.key: (measure, pairs[measure.key]) for measure in measures}, rows)
    return by_measure


def _by_tag(sides: Mapping[str, _Side], questions: Sequence[Question], tags: Sequence[str]) -> dict[str, Numbers]:
    by_tag: dict[str, Numbers] = {}
    if not any(tags):  # the held-out file does not have the run's tag column
        return by_tag
    for tag in sorted(set(tags)):
        rows = [i for i, own in enumerate(tags) if own == tag]
        prompts = [i for i, question in enumerate(questions) if tags[question.row] == tag]
        by_tag[tag] = {"rows": len(rows), **{name: side.numbers(rows, prompts) for name, side in sides.items()}}
    return by_tag


def _not_finite(results: Mapping[str, Numbers]) -> list[str]:
    """A sentence for each model that has a number that is not finite."""
    flags = []
    for name, numbers in results.items():
        found = [key for key, value in numbers.items() if isinstance(value, float) and not math.isfinite(value)]
        if found:
            flags.append(f"{', '.join(found)} of {name}: not finite, so the models can't be compared by it")
    return flags


def _flags(results: Mapping[str, Numbers], limit: int) -> list[str]:
    """Sentences about answers that don't stop or repeat themselves, for the last model: `tuned` if there is one."""
    name, numbers = list(results.items())[-1]
    if not numbers["prompts"]:
        return []
    flags = []
    endless = 100 - numbers["stopped"]
    if endless >= FLAGGED:
        flags.append(
            f"{endless:.0f}% of the answers of {name} never stopped: they were cut at {limit} tokens "
            "(evaluation.max_new_tokens)"
        )
    if numbers["repeating"] >= FLAGGED:
        flags.append(
            f"{numbers['repeating']:.0f}% of the answers of {name} go in circles: some four words in a row occur three "
            "times or more"
        )
    return flags
