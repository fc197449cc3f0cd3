"""What a model is measured by: one table of names, headings and directions, for whoever counts, shows or compares."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any, Literal, NamedTuple

# scored: over labelled tokens, without an answer. metric: of answers, where `evaluation.metrics` names it.
# answer: of answers, always.
Kind = Literal["scored", "metric", "answer"]


class Measure(NamedTuple):
    """One number of an evaluation.

    Attributes:
        key: its name in results.json.
        heading: what a table calls it.
        form: the format of its numbers.
        is_percent: it is a share of a hundred, so that a difference is one of points.
    """

    key: str
    heading: str
    form: str
    more_is_better: bool
    is_percent: bool = True
    kind: Kind = "metric"

    def change(self, before: float, after: float) -> tuple[str, bool]:
        """The signed difference in this measure's format, and whether it is one for the better."""
        difference = after - before
        better = difference > 0 if self.more_is_better else difference < 0
        return self.amount(difference, sign=True), better

    def amount(self, value: float, *, sign: bool = False) -> str:
        """A number in this measure's format, with its sign if asked."""
        if not math.isfinite(value):
            return "not finite"
        return (self.form.replace("{:", "{:+") if sign else self.form).format(value)


MEASURES = (
    Measure("prefers_chosen", "prefers the chosen answer %", "{:.1f}", True, True, "scored"),
    Measure("prefers_chosen_a_token", "the same, by its mean token %", "{:.1f}", True, True, "scored"),
    Measure("loss", "loss (nats a token)", "{:.4f}", False, False, "scored"),
    Measure("perplexity", "perplexity", "{:.2f}", False, False, "scored"),
    Measure("token_accuracy", "token accuracy %", "{:.1f}", True, True, "scored"),
    Measure("exact_match", "exact match %", "{:.1f}", True),
    Measure("rouge1", "ROUGE-1", "{:.1f}", True),
    Measure("rouge2", "ROUGE-2", "{:.1f}", True),
    Measure("rouge_l", "ROUGE-L", "{:.1f}", True),
    Measure("bleu", "BLEU", "{:.1f}", True),
    Measure("chrf", "chrF", "{:.1f}", True),
    Measure("json_valid", "valid JSON %", "{:.1f}", True),
    Measure("json_fields", "JSON fields right %", "{:.1f}", True),
    Measure("stopped", "stopped by itself %", "{:.1f}", True, kind="answer"),
    Measure("repeating", "going in circles %", "{:.1f}", False, kind="answer"),
)
# Of what was measured, and how long answers are where held-out rows are pairs: neither more nor less is better.
COUNTS = ("labelled_tokens", "prompts", "answer_words")
TIMES = ("runtime", "samples_per_second", "steps_per_second")  # what transformers logs of an evaluation besides


def keys_of(kind: Kind) -> tuple[str, ...]:
    """The keys of the measures of one kind, in order."""
    return tuple(measure.key for measure in MEASURES if measure.kind == kind)


METRICS = keys_of("metric")
# Names that a metric of the user's own can't have: other numbers stand under them.
RESERVED = frozenset({*(measure.key for measure in MEASURES), *COUNTS, *TIMES})


def measures_of(keys: Collection[str], less_is_better: Collection[str] = ()) -> list[Measure]:
    """The measures among `keys`: those of the table, then a user's own."""
    known = {measure.key: measure for measure in MEASURES}
    own = [key for key in keys if key not in known and key not in COUNTS]
    return [
        *(measure for measure in MEASURES if measure.key in keys),
        *(Measure(key, key.replace("_", " "), "{:.1f}", key not in less_is_better, False) for key in own),
    ]


def measured(sides: Mapping[str, Mapping[str, Any]]) -> list[Measure]:
    """The measures of which every side has a number."""
    keys = list(next(iter(sides.values()), {}))
    return measures_of([key for key in keys if all(side.get(key) is not None for side in sides.values())])
