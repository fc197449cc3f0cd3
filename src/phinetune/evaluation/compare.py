"""Compares the base model with the tuned model on the same held-out chats."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol

from transformers import PreTrainedTokenizerBase

from phinetune import processes
from phinetune.chats.encoder import ChatEncoder
from phinetune.config.evaluation import EvaluationSection
from phinetune.data.prepare.chat_sets import ChatSet
from phinetune.data.prepare.shared_rows import shared_sentences
from phinetune.evaluation.answering import Answers, Question, answer_all, questions_of
from phinetune.evaluation.bootstrap import Array, Difference, Units
from phinetune.evaluation.classes import Classes, class_tree
from phinetune.evaluation.countable import check_classes
from phinetune.evaluation.drawn_together import DrawnTogether, group_sentences
from phinetune.evaluation.hard_rows import hard_rows
from phinetune.evaluation.json_answers import field_shares
from phinetune.evaluation.judge import judge_answers
from phinetune.evaluation.measured import Measured, Numbers, by_tag, differences_of, finite, unseen
from phinetune.evaluation.metrics import Metrics
from phinetune.evaluation.preferences import are_pairs, score_pairs, win_rate, worth_imitating
from phinetune.evaluation.together import score_together
from phinetune.evaluation.trust import few_answers, few_rows
from phinetune.metric_table import COUNTS, MEASURES, measures_of

FLAGGED = 10.0  # percent; if so many answers don't stop or repeat themselves, a sentence says so

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
    """The result of a comparison. Models are called `base` and `tuned`; `start` is where a run went on from.

    Attributes:
        results: by model: the loss (nats per labelled token), the perplexity, `token_accuracy` and shares in percent,
            the mean of every metric over the rows, and the counts `labelled_tokens` and `prompts`.
        examples: every answered prompt.
        differences: by measure: tuned minus base, with its 95% interval; empty if there is only one model.
        by_tag: by value of the tag column: how many `rows` have it, and by model the same numbers as in `results`.
        json_fields: by model and by field: the percentage of answers in which the field is right; empty if no reference
            is JSON.
        classes: by metric that sorts answers into classes: its labels, and by model the confusion matrix and the scores
            of each class.
        own: by metric of the user's own: whether less is better (`less_is_better`), and whether it is a share of a
            hundred (`is_percent`).
        flags: sentences about what the user should look at.
        data: what became of the held-out rows, as in results.json.
        overlap: how many of them were trained on, as in results.json; None if that was not looked at.
        unseen: the verdict on the rows that are no copies of training rows, as in results.json; None without copies.
        kept: what the tuned model kept on neutral chats, as in results.json; None if that was not measured.
        hard: which kinds of rows are learnt worst, as `hard_rows` gives it; None if that was not looked at.
        judged: what each judge says, by its name, see `judge.judge_answers`; empty without judges.
        win_rate: how often the tuned model's answer is the better one, see `preferences.win_rate`; None if not asked.
        since_start: the same for `start` and `tuned`, of which only results, differences and win rate are told; None
            for a run that began with a new adapter.
    """

    results: dict[str, Numbers]
    examples: list[Example]
    differences: dict[str, Difference] = field(default_factory=dict)
    by_tag: dict[str, Numbers] = field(default_factory=dict)
    json_fields: dict[str, dict[str, float]] = field(default_factory=dict)
    classes: dict[str, Any] = field(default_factory=dict)
    own: dict[str, dict[str, bool]] = field(default_factory=dict)
    flags: list[str] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)
    overlap: dict[str, Any] | None = None
    unseen: dict[str, Any] | None = None
    kept: dict[str, Any] | None = None
    hard: dict[str, Any] | None = None
    judged: dict[str, Any] = field(default_factory=dict)
    win_rate: dict[str, Any] | None = None
    since_start: Comparison | None = None

    def to_dict(self) -> dict[str, Numbers]:
        """`results` for the key `evaluation` of results.json. JSON has no infinity, so null replaces it."""
        return {name: finite(numbers) for name, numbers in self.results.items()}

    def to_tree(self, examples: int | None = None) -> dict[str, Any]:
        """Everything but `data` and `overlap`, with the keys of results.json and `phinetune evaluate --out`.

        Args:
            examples: how many of the examples, from the first; None is all.
        """
        return {
            "evaluation": self.to_dict(),
            "differences": {key: finite(difference.to_dict()) for key, difference in self.differences.items()},
            "by_tag": {tag: finite(numbers) for tag, numbers in self.by_tag.items()},
            "json_fields": self.json_fields,
            "classes": self.classes,
            "own": self.own,
            "flags": self.flags,
            **({"unseen": self.unseen} if self.unseen else {}),
            **({"kept": self.kept} if self.kept else {}),
            **({"hard": self.hard} if self.hard else {}),
            **({"judged": self.judged} if self.judged else {}),
            **({"win_rate": self.win_rate} if self.win_rate else {}),
            **({"since_start": self.since_start.numbers()} if self.since_start else {}),
            "examples": [asdict(example) for example in self.examples[:examples]],
        }

    def numbers(self) -> dict[str, Any]:
        """What `to_tree` gives of results, differences and win rate."""
        tree = self.to_tree(examples=0)
        return {key: tree[key] for key in ("evaluation", "differences", "own", "win_rate") if key in tree}


class Watcher(Protocol):
    """Gets told how far a comparison is."""

    def begin(self, chats: int, prompts: int, sides: Sequence[str]) -> None:
        """The comparison begins. Each side scores this number of chats and answers this number of prompts."""

    def side(self, name: str) -> None:
        """The side `base`, `start` or `tuned` begins."""

    def advance(self, count: int) -> None:
        """`count` more chats have been scored, or prompts answered or judged."""

    def judging(self, name: str, prompts: int) -> None:
        """A judge begins, and is asked about this number of prompts."""


class _Unwatched:
    def begin(self, chats: int, prompts: int, sides: Sequence[str]) -> None: ...
    def side(self, name: str) -> None: ...
    def advance(self, count: int) -> None: ...
    def judging(self, name: str, prompts: int) -> None: ...


def compare(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    encoder: ChatEncoder,
    held_out: ChatSet,
    section: EvaluationSection,
    metrics: Metrics,
    watcher: Watcher | None = None,
    base: Side | None = None,
    start: Side | None = None,
) -> Comparison:
    """Score the held-out chats and let the model answer their prompts, without and with its adapter.

    A model without an adapter is `base`, and there is no `tuned`.

    Args:
        metrics: what `phinetune.evaluation.metrics.open_metrics` returned for the section.
        watcher: gets told how far the comparison is.
        base: gives the base, as `phinetune.checkpoints.untouched` does. None: it is the model without its adapter,
            which holds for every adapter that left its base as it was.
        start: gives the model as it was when the run started, where that is not the base.

    Raises:
        RunError: a metric failed; the error says on which answer.
        DataError: answers are to be sorted into classes, and the chats' own can't be.
    """
    watcher, held_out = watcher or _Unwatched(), worth_imitating(held_out)
    questions = questions_of(encoder, held_out, section.max_prompts) if section.generate else []
    check_classes(metrics, questions)
    models = sides_of(model, base)
    if start and "tuned" in models:
        models = {"base": models["base"], "start": start, "tuned": models["tuned"]}
    model.eval()
    sides: dict[str, Measured] = {}
    watcher.begin(len(held_out), len(questions), list(models))
    size = None if section.batch_size == "auto" else section.batch_size
    pairs, together = are_pairs(held_out.encoded), DrawnTogether.of(held_out, questions)
    for name, opened in models.items():
        watcher.side(name)
        with opened() as one:
            preferred: dict[str, Array] = {}
            if pairs:
                scores, preferred = score_pairs(one, held_out.encoded, size, watcher.advance)
            else:
                scores = score_together(one, held_out.encoded, size, watcher.advance)
            answered = Answers([], {})
            if questions:
                answered = answer_all(one, tokenizer, questions, section, metrics, watcher.advance)
        sides[name] = Measured(scores, answered, preferred, together)
    both = {name: one for name, one in sides.items() if name != "start"}
    compared = replace(_compared(both, questions, held_out, section), judged=_judged(both, questions, section, watcher))
    return replace(compared, since_start=_since_start(sides, section)) if "start" in sides else compared


def _judged(
    sides: Mapping[str, Measured], questions: Sequence[Question], section: EvaluationSection, watcher: Watcher
) -> dict[str, Any]:
    """What judges say of the answers of both models; empty if there is one model alone.

    Of several processes the main one asks: judges cost money.
    """
    if len(sides) < 2 or not processes.is_main():
        return {}
    base, tuned = ([answer.text for answer in side.answered.answers] for side in sides.values())
    units = _units(sides)
    return judge_answers(section, questions, base, tuned, units, watcher.judging, watcher.advance)


def _units(sides: Mapping[str, Measured]) -> Units | None:
    """What the prompts are drawn with."""
    together = next(iter(sides.values())).together
    return together.prompts if together else None


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
    sides: dict[str, Measured], questions: Sequence[Question], held_out: ChatSet, section: EvaluationSection
) -> Comparison:
    results = {name: side.numbers() for name, side in sides.items()}
    found, few = differences_of(sides, results, section) if len(sides) == 2 else ({}, [])
    tagged, untold = by_tag(sides, questions, held_out.tags)
    overlap = held_out.shared.to_dict() if held_out.shared else None
    apart, told = unseen(sides, questions, held_out, section)
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
        found,
        tagged,
        fields if any(fields.values()) else {},
        _classes(sides),
        _own(results, section),
        [
            *shared_sentences(overlap or {}),
            *told,
            *unlooked,
            *_not_finite(results),
            *_flags(results, section.max_new_tokens),
            *few,
            *untold,
            *few_rows(len(held_out)),
            *group_sentences(held_out),
            *few_answers(len(held_out), len(questions)),
        ],
        held_out.report.to_dict(),
        overlap,
        apart,
        hard=hard_rows(sides["base"].scores, sides["tuned"].scores, held_out) if len(sides) == 2 else None,
        win_rate=_won(sides, section),
    )


def _since_start(sides: Mapping[str, Measured], section: EvaluationSection) -> Comparison:
    """The model as the run started with it, and the tuned one."""
    both = {name: sides[name] for name in ("start", "tuned")}
    results = {name: side.numbers() for name, side in both.items()}
    found, _ = differences_of(both, results, section)
    return Comparison(results, [], found, own=_own(results, section), win_rate=_won(both, section))


def _own(results: Mapping[str, Numbers], section: EvaluationSection) -> dict[str, dict[str, bool]]:
    known = {measure.key for measure in MEASURES} | set(COUNTS)
    keys = [key for key in dict.fromkeys(key for numbers in results.values() for key in numbers) if key not in known]
    less, percents = section.less_is_better(keys), section.percents(keys)
    return {key: {"less_is_better": key in less, "is_percent": key in percents} for key in keys}


def _won(sides: Mapping[str, Measured], section: EvaluationSection) -> dict[str, Any] | None:
    by = section.win_rate_by
    if by is None or len(sides) < 2:
        return None
    more_is_better = measures_of([by], section.less_is_better([by]))[0].more_is_better
    before, after = (side.answered for side in sides.values())
    return win_rate(by, before, after, more_is_better, next(iter(sides)), _units(sides))


def _classes(sides: Mapping[str, Measured]) -> dict[str, Any]:
    answered = {name: side.answered for name, side in sides.items()}
    first = next(iter(answered.values()))
    return {
        one.metric.name: class_tree(
            one.function, {name: side.judged.answers for name, side in answered.items()}, first.judged.references
        )
        for one in first.sets
        if isinstance(one.function, Classes)
    }


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
