"""What a comparison counts from the scores and answers of both models: numbers, differences, by tag, without copies."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from phinetune.config.evaluation import EvaluationSection
from phinetune.data.prepare.chat_sets import ChatSet
from phinetune.engine.scoring import Score
from phinetune.errors import RunError
from phinetune.evaluation.answering import Answers, Question
from phinetune.evaluation.bootstrap import Array, Difference, Pairs, differences
from phinetune.evaluation.drawn_together import DrawnTogether
from phinetune.evaluation.preferences import answer_words
from phinetune.evaluation.trust import FEW, few_rows, unseen_places, unseen_sentence
from phinetune.metric_table import measures_of

Numbers = dict[str, Any]


@dataclass(frozen=True)
class Measured:
    """One model's scores, row by row, and its answers, prompt by prompt.

    Attributes:
        preferred: of held-out pairs, what `preferences.score_pairs` gives, by name and row by row.
        together: which rows and prompts intervals draw together; None: each by itself.
    """

    scores: list[Score]
    answered: Answers
    preferred: Mapping[str, Array] = field(default_factory=dict)
    together: DrawnTogether | None = None

    def part(self, rows: Sequence[int], prompts: Sequence[int]) -> Measured:
        """The same for some rows and prompts."""
        whole = self.answered
        picked = {name: numbers[list(prompts)] for name, numbers in whole.numbers.items()}
        answers = Answers([whole.answers[i] for i in prompts], picked, whole.judged.at(prompts), whole.sets)
        preferred = {name: values[list(rows)] for name, values in self.preferred.items()}
        together = self.together.at(rows, prompts) if self.together else None
        return Measured([self.scores[i] for i in rows], answers, preferred, together)

    def by_row(self) -> Measured:
        """The same without the metrics over the set."""
        return replace(self, answered=replace(self.answered, sets=()))

    def numbers(self) -> Numbers:
        """The numbers over all rows and prompts.

        Raises:
            RunError: a metric over the set failed.
        """
        preferred = {name: float(np.mean(values)) for name, values in self.preferred.items()}
        words = {"answer_words": answer_words(self.answered)} if preferred else {}
        prompts = len(self.answered.answers)
        return {**_scored(self.scores), **preferred, "prompts": prompts, **words, **self.answered.means()}

    def some_numbers(self, rows: Sequence[int], prompts: Sequence[int]) -> tuple[Numbers, list[str]]:
        """The numbers over some rows and prompts, and why a metric over the set has none for them: it may need more."""
        part = self.part(rows, prompts)
        try:
            return part.numbers(), []
        except RunError as error:
            return part.by_row().numbers(), error.problems


def finite(tree: Numbers) -> Numbers:
    """The tree with None for every number that JSON can't hold."""
    return {
        key: finite(value)
        if isinstance(value, dict)
        else None
        if isinstance(value, float) and not math.isfinite(value)
        else value
        for key, value in tree.items()
    }


def _scored(scores: Sequence[Score]) -> Numbers:
    score = sum(scores, Score())
    return {
        "loss": score.loss,
        "perplexity": score.perplexity,
        "token_accuracy": 100 * score.token_accuracy,
        "labelled_tokens": score.tokens,
    }


def unseen(
    sides: Mapping[str, Measured], questions: Sequence[Question], held_out: ChatSet, section: EvaluationSection
) -> tuple[dict[str, Any] | None, list[str]]:
    """The verdict without the rows that were trained on, and as sentences."""
    places = unseen_places(held_out, questions) if len(sides) == 2 else None
    if places is None:
        return None, []
    parts = {name: side.part(*places) for name, side in sides.items()}
    lines: list[str] = []
    try:
        results = {name: part.numbers() for name, part in parts.items()}
    except RunError as error:
        lines = [f"on the held-out chats that are no copies: {problem}" for problem in error.problems]
        parts = {name: part.by_row() for name, part in parts.items()}
        results = {name: part.numbers() for name, part in parts.items()}
    found, few = differences_of(parts, results, section)
    rows = len(places[0])
    tree = {
        "rows": rows,
        "evaluation": {name: finite(numbers) for name, numbers in results.items()},
        "differences": {key: finite(one.to_dict()) for key, one in found.items()},
    }
    told = few_rows(rows, "held-out chats that are no copies") if len(held_out) >= FEW else []  # else it is told of all
    return tree, [unseen_sentence(rows, found), *told, *lines, *few]


def differences_of(
    sides: Mapping[str, Measured], results: Mapping[str, Numbers], section: EvaluationSection
) -> tuple[dict[str, Difference], list[str]]:
    """The difference of both models in every measure: of loss and tokens over rows, of answers over prompts. Then
    lines about intervals that come from few resamples.
    """
    base, tuned = sides.values()

    def per_token(name: str, factor: float = 1.0, exponential: bool = False) -> Pairs:
        def column(side: Measured, name: str) -> np.ndarray[Any, np.dtype[np.float64]]:
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
    answered = {name: both for name in tuned.answered.row_means() if (both := mean(name)).base_weights.any()}
    by_measure: dict[str, Difference] = {}
    together = base.together
    over_rows = scored, len(base.scores), together.rows if together else None
    over_prompts = answered, len(base.answered.answers), together.prompts if together else None
    for pairs, rows, units in (over_rows, over_prompts):
        shown = {key: [side.get(key) for side in results.values()] for key in pairs}
        measures = measures_of(list(pairs), section.less_is_better(pairs), section.percents(pairs), shown)
        by_measure |= differences({measure.key: (measure, pairs[measure.key]) for measure in measures}, rows, units)
    lines: list[str] = []
    for metric, before, after in zip(tuned.answered.sets, base.answered.whole, tuned.answered.whole, strict=False):
        made, told = metric.differences(
            base.answered.judged,
            tuned.answered.judged,
            before.numbers,
            after.numbers,
            before.seconds + after.seconds,
            over_prompts[-1],
        )
        by_measure, lines = by_measure | made, lines + told
    return by_measure, lines


def by_tag(
    sides: Mapping[str, Measured], questions: Sequence[Question], tags: Sequence[str]
) -> tuple[dict[str, Numbers], list[str]]:
    """The numbers by tag, and a line for each tag on whose answers a metric over the set fails."""
    tagged: dict[str, Numbers] = {}
    lines: list[str] = []
    if not any(tags):  # the held-out file does not have the run's tag column
        return tagged, lines
    for tag in sorted(set(tags)):
        rows = [i for i, own in enumerate(tags) if own == tag]
        prompts = [i for i, question in enumerate(questions) if tags[question.row] == tag]
        tagged[tag] = {"rows": len(rows)}
        for name, side in sides.items():
            tagged[tag][name], failed = side.some_numbers(rows, prompts)
            lines += [f"of tag {tag!r}, {name}: {problem}" for problem in failed]
    return tagged, lines
