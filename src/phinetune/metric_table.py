"""What a model is measured by: one table of names, headings and directions, for whoever counts, shows or compares."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal, NamedTuple

# scored: over labelled tokens, without an answer. metric: of answers, where `evaluation.metrics` names it.
# answer: of answers, always.
Kind = Literal["scored", "metric", "answer"]


LESS = "↓"  # stands behind the heading of a measure in which less is better
LESS_TOLD = f"{LESS} less is better; elsewhere more is"


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

    @property
    def titled(self) -> str:
        """The heading, with `LESS` where less is better."""
        return self.heading if self.more_is_better else f"{self.heading} {LESS}"

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


LOSS = Measure("loss", "loss (nats a token)", "{:.4f}", False, False, "scored")
MEASURES = (
    Measure("prefers_chosen", "prefers the chosen answer %", "{:.1f}", True, True, "scored"),
    Measure("prefers_chosen_a_token", "the same, by its mean token %", "{:.1f}", True, True, "scored"),
    LOSS,
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


def measures_of(
    keys: Collection[str],
    less_is_better: Collection[str] = (),
    percents: Collection[str] = (),
    values: Mapping[str, Sequence[Any]] | None = None,
) -> list[Measure]:
    """The measures among `keys`: those of the table, then a user's own.

    Args:
        less_is_better: the keys of own ones in which less is better.
        percents: the keys of own ones that are shares of a hundred.
        values: what will be shown of them, by key; it decides how many decimals an own one needs.
    """
    known = {measure.key: measure for measure in MEASURES}
    own = [key for key in keys if key not in known and key not in COUNTS]
    return [
        *(measure for measure in MEASURES if measure.key in keys),
        *(_own(key, key not in less_is_better, key in percents, (values or {}).get(key, ())) for key in own),
    ]


def _own(key: str, more_is_better: bool, is_percent: bool, values: Sequence[Any]) -> Measure:
    """A measure of the user's own. Numbers up to 1 may be shares, whose third decimal still says something."""
    numbers = [abs(value) for value in values if isinstance(value, (int, float)) and math.isfinite(value)]
    form = "{:.3f}" if numbers and 0 < max(numbers) <= 1 and not is_percent else "{:.1f}"
    return Measure(
        key,
        key.replace("_", " ").replace("macro f1", "macro-F1") + (" %" if is_percent else ""),
        form,
        more_is_better,
        is_percent,
    )


def measured(
    sides: Mapping[str, Mapping[str, Any]], own: Mapping[str, Mapping[str, Any]] | None = None
) -> list[Measure]:
    """The measures of which every side has a number.

    Args:
        own: what results.json says of own ones, by key: `less_is_better` and `is_percent`.
    """
    keys = [key for key in next(iter(sides.values()), {}) if all(side.get(key) is not None for side in sides.values())]
    less, percents = (
        [key for key, said in (own or {}).items() if said.get(what)] for what in ("less_is_better", "is_percent")
    )
    return measures_of(keys, less, percents, {key: [side[key] for side in sides.values()] for key in keys})
