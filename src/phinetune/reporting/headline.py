"""The sentence at the top of a run's page: what training changed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from phinetune.data.prepare.shared_rows import all_shared, shared_sentences
from phinetune.metric_table import Measure, measured, measures_of
from phinetune.reporting.facts import RunFacts

# Measures of answers.
ANSWERED = ("exact_match", "json_fields", "rouge_l", "chrf")
# The headline names the loss and the first of these that was measured and is not zero for both models; a metric of the
# user's own comes before the token accuracy.
BESIDE_LOSS = ("prefers_chosen", *ANSWERED, "token_accuracy")
UNCLEAR = "no clear difference"  # a verdict of the paired bootstrap
VERBS = {True: "rose", False: "fell"}


def headline(run: RunFacts) -> str:
    """The sentence at the top of a run's page."""
    sides = run.comparison
    if "base" in sides and "tuned" in sides:
        return _compared(run, sides["base"], sides["tuned"])
    losses = [entry["loss"] for entry in run.entries if isinstance(entry.get("loss"), (int, float))]
    if not losses:
        return "No step has been logged yet." if run.state == "running" else "Nothing was measured in this run."
    told = f"The training loss went from {losses[0]:.2f} to {losses[-1]:.2f}"
    done, planned = run.steps
    if run.state == "running":
        return f"{told} in the first {done} of {planned or '?'} steps."
    if run.state == "stopped":
        return f"{told} in {done} of {planned or '?'} steps; the run was stopped before its end."
    return f"{told} over {done} steps; it was not compared with its base on held-out chats."


def _compared(run: RunFacts, base: Mapping[str, Any], tuned: Mapping[str, Any]) -> str:
    both = {measure.key: measure for measure in measured({"base": base, "tuned": tuned})}
    told = [measure for measure in (measure_beside_loss(run.evaluated), both.get("loss")) if measure]
    chats, prompts = run.held_out.get("kept"), tuned.get("prompts")
    broken = not_finite({"base": base, "tuned": tuned})
    parts = list(broken)
    for measure in told:
        some = measure.kind != "scored" and prompts and chats and prompts < chats
        ends = interval(measure, run.differences.get(measure.key) or {})
        parts.append(
            (f"on {prompts:,} answered prompts " if some else "")
            + _change(measure, base[measure.key], tuned[measure.key])
            + (f" (95% interval {ends})" if ends and measure.key != "loss" else "")
        )
    where = f"on {chats:,} {run.measured_on}" if chats else f"on the {run.measured_on}"
    verdict = "Not finite" if broken else _verdict(run, told, base, tuned)
    said = f"{verdict} {where}: {', '.join(parts)}."
    shared = [f"{sentence}." for sentence in shared_sentences(run.overlap)]
    if all_shared(run.overlap):
        return " ".join([*shared, f"On them: {said[0].lower()}{said[1:]}"])
    return " ".join([said, *shared])


def not_finite(sides: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The measures that are not finite, as `loss of tuned is not finite`. In the files of a run they are null."""
    return [
        f"{_name(measure)} of {side} is not finite"
        for side, numbers in sides.items()
        for measure in measures_of([key for key, value in numbers.items() if value is None])
    ]


def _verdict(run: RunFacts, told: Sequence[Measure], base: Mapping[str, Any], tuned: Mapping[str, Any]) -> str:
    """A word or two about the named measures together. A change that may be chance does not count."""
    improved = set()
    for measure in told:
        clear = run.differences.get(measure.key, {}).get("verdict") != UNCLEAR
        if clear and base[measure.key] != tuned[measure.key]:
            improved.add(measure.change(base[measure.key], tuned[measure.key])[1])
    return {frozenset([True]): "Better", frozenset([False]): "Worse", frozenset(): "No clear difference"}.get(
        frozenset(improved), "Mixed"
    )


def interval(measure: Measure, difference: Mapping[str, Any]) -> str:
    """The interval of a change, as `+24.0 to +38.0`. Empty if there were too few rows to compute one."""
    ends = [difference.get(end) for end in ("low", "high")]
    if not all(isinstance(end, (int, float)) and math.isfinite(end) for end in ends):
        return ""
    return " to ".join(measure.amount(float(end or 0), sign=True) for end in ends).replace("-", "−")


def measure_beside_loss(evaluated: Mapping[str, Any]) -> Measure | None:
    """The measure to name beside the loss: the one that says most about the answers.

    If no prompts were answered, it is the token accuracy. None if that was not measured either.

    Args:
        evaluated: results.json or evaluation.json of a comparison of two models.
    """
    base, tuned = evaluated["evaluation"]["base"], evaluated["evaluation"]["tuned"]
    own = evaluated.get("own") or {}
    both = {measure.key: measure for measure in measured({"base": base, "tuned": tuned}, own)}
    keys = (*ANSWERED, *own, *BESIDE_LOSS)
    return next((both[key] for key in keys if key in both and (base[key] or tuned[key])), None)


def _name(measure: Measure) -> str:
    return measure.heading.partition(" (")[0].removesuffix(" %")


def _change(measure: Measure, before: float, after: float) -> str:
    """A change in words, as `exact match rose from 0.0% to 96.3%`."""
    name, percent = _name(measure), "%" if " %" in measure.heading else ""
    if before == after:
        return f"{name} stayed at {_spell(measure, after)}{percent}"
    first, last = _spell(measure, before), _spell(measure, after)
    return f"{name} {VERBS[after > before]} from {first}{percent} to {last}{percent}"


def _spell(measure: Measure, value: float) -> str:
    """A value as text: the loss with three significant digits, other measures as in the tables."""
    return f"{value:.3g}" if measure.key == "loss" else measure.amount(value)
