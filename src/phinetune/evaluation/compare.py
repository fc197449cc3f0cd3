"""Base against tuned over the same held-out chats."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress
from transformers import PreTrainedTokenizerBase

from phinetune.chat.encoder import ChatEncoder
from phinetune.config.run import CustomMetric, EvaluationSection
from phinetune.data.prepare.build import ChatSet
from phinetune.engine.scoring import Score
from phinetune.evaluation.answering import Answers, Question, answer_all, questions_of
from phinetune.evaluation.bootstrap import Difference, Pairs, differences
from phinetune.evaluation.json_answers import field_shares
from phinetune.evaluation.metrics import row_metrics
from phinetune.evaluation.scoring import score_rows
from phinetune.measures import measures_of

FLAGGED = 10.0  # percent of answers that don't stop, or go in circles, from which it is said in words

Numbers = dict[str, Any]


@dataclass(frozen=True)
class Example:
    """One held-out prompt (its last user turn), the reference, what was answered by whom, and how good that was."""

    prompt: str
    reference: str
    answers: dict[str, str]
    scores: dict[str, dict[str, float]]


@dataclass(frozen=True)
class Comparison:
    """What was found, by model (`base`, `tuned`). All of it is plain JSON in `to_tree`.

    Attributes:
        results: by model: loss (nats a labelled token), perplexity, token_accuracy and shares in percent, the mean
            over rows of every metric, and the counts `labelled_tokens` and `prompts`.
        differences: by measure: tuned minus base with its 95% interval; empty for a model alone.
        by_tag: by the tag column's values: `rows`, and by model what `results` has.
        json_fields: by model: percent of answers with a field right, by field; empty without JSON references.
        flags: what should be looked at, in sentences.
        examples: every answered prompt.
        data: what became of the held-out rows, as results.json has it.
    """

    results: dict[str, Numbers]
    examples: list[Example]
    differences: dict[str, Difference] = field(default_factory=dict)
    by_tag: dict[str, Numbers] = field(default_factory=dict)
    json_fields: dict[str, dict[str, float]] = field(default_factory=dict)
    flags: list[str] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Numbers]:
        """`results`: the part `evaluation` of results.json. JSON has no infinity: null stands for it."""
        return {name: _finite(numbers) for name, numbers in self.results.items()}

    def to_tree(self, examples: int | None = None) -> dict[str, Any]:
        """Everything, under the keys that results.json and `phinetune evaluate --out` have; the first examples only."""
        return {
            "evaluation": self.to_dict(),
            "differences": {
                key: one.to_dict()
                for key, one in self.differences.items()
                if math.isfinite(one.change + one.low + one.high)
            },
            "by_tag": {tag: _finite(found) for tag, found in self.by_tag.items()},
            "json_fields": self.json_fields,
            "flags": self.flags,
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
    """What one model did, row by row and prompt by prompt."""

    scores: list[Score]
    answered: Answers

    def numbers(self, rows: Sequence[int] | None = None, prompts: Sequence[int] | None = None) -> Numbers:
        """Over all rows and prompts, or some."""
        score = sum((self.scores[i] for i in rows) if rows is not None else self.scores, Score())
        return {
            "loss": score.loss,
            "perplexity": score.perplexity,
            "token_accuracy": 100 * score.token_accuracy,
            "labelled_tokens": score.tokens,
            "prompts": len(self.answered.answers if prompts is None else prompts),
            **self.answered.means(prompts),
        }


def compare(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    encoder: ChatEncoder,
    held_out: ChatSet,
    section: EvaluationSection,
    console: Console,
) -> Comparison:
    """Score and question the model without and with its adapter; a model without one is `base` alone.

    Raises:
        ConfigError: a metric's function can't be had.
        RunError: it failed on an answer.
    """
    metrics = row_metrics(section) if section.generate else {}
    questions = questions_of(encoder, held_out, section.max_prompts) if section.generate else []
    tuned = hasattr(model, "disable_adapter")
    ways: dict[str, Callable[[], Any]] = {"base": model.disable_adapter if tuned else contextlib.nullcontext}
    if tuned:
        ways["tuned"] = contextlib.nullcontext
    model.eval()
    sides: dict[str, _Side] = {}
    asked = f" and letting {' and '.join(ways)} answer {len(questions)} prompts" if questions else ""
    console.print(f"Scoring {len(held_out)} held-out chats{asked} …", highlight=False)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        for name, way in ways.items():
            task = progress.add_task(f"evaluating {name}", total=len(held_out) + len(questions))
            advance = partial(progress.advance, task)
            size = None if section.batch_size == "auto" else section.batch_size
            with way():
                scores = score_rows(model, held_out.encoded, size, advance)
                answered = Answers([], {})
                if questions:
                    answered = answer_all(model, tokenizer, questions, section, metrics, advance)
            sides[name] = _Side(scores, answered)
    return _compared(sides, questions, held_out, section)


def _compared(
    sides: dict[str, _Side], questions: Sequence[Question], held_out: ChatSet, section: EvaluationSection
) -> Comparison:
    results = {name: side.numbers() for name, side in sides.items()}
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
        _flags(results, section.max_new_tokens),
        held_out.report.to_dict(),
    )


def _differences(sides: Mapping[str, _Side], section: EvaluationSection) -> dict[str, Difference]:
    """Tuned against base in every measure: of loss and tokens over rows, of answers over prompts."""
    base, tuned = sides["base"], sides["tuned"]
    own_way = [one.name for one in section.metrics if isinstance(one, CustomMetric) and one.less_is_better]

    def ratio(top: str, times: float = 1.0, exponential: bool = False) -> Pairs:
        def column(side: _Side, name: str) -> np.ndarray[Any, np.dtype[np.float64]]:
            return np.array([getattr(score, name) for score in side.scores], dtype=np.float64)

        tops, tokens = ((column(base, name), column(tuned, name)) for name in (top, "tokens"))
        return Pairs(times * tops[0], times * tops[1], tokens[0], tokens[1], exponential)

    def mean(name: str) -> Pairs:
        before, after = base.answered.numbers[name], tuned.answered.numbers[name]
        there = ~np.isnan(before + after)  # paired: only rows of which both have a number
        weights = there.astype(np.float64)
        return Pairs(np.where(there, before, 0.0), np.where(there, after, 0.0), weights, weights)

    scored = {
        "loss": ratio("nll"),
        "perplexity": ratio("nll", exponential=True),
        "token_accuracy": ratio("correct", 100.0),
    }
    answered = {name: mean(name) for name in tuned.answered.means()}
    found: dict[str, Difference] = {}
    for pairs, rows in ((scored, len(base.scores)), (answered, len(base.answered.answers))):
        measures = measures_of(list(pairs), own_way)
        found |= differences({measure.key: (measure, pairs[measure.key]) for measure in measures}, rows)
    return found


def _by_tag(sides: Mapping[str, _Side], questions: Sequence[Question], tags: Sequence[str]) -> dict[str, Numbers]:
    found: dict[str, Numbers] = {}
    if not any(tags):  # the run's column is not in this file
        return found
    for tag in sorted(set(tags)):
        rows = [i for i, one in enumerate(tags) if one == tag]
        prompts = [i for i, question in enumerate(questions) if tags[question.row] == tag]
        found[tag] = {"rows": len(rows), **{name: side.numbers(rows, prompts) for name, side in sides.items()}}
    return found


def _flags(results: Mapping[str, Numbers], limit: int) -> list[str]:
    """Sentences on a model that doesn't stop or goes in circles; the last one's, which is the one in question."""
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
            f"{numbers['repeating']:.0f}% of the answers of {name} go in circles: some four words in a row come three "
            "times or more"
        )
    return flags
