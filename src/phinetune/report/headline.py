"""What a run gained, in one sentence."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from phinetune.measures import Measure, measured
from phinetune.report.facts import RunFacts

# The first of these that was measured, and is not nought on both sides, is told beside the loss.
ANSWERED = ("exact_match", "json_fields", "rouge_l", "chrf")
TELLING = (*ANSWERED, "token_accuracy")
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
    told = [measure for measure in (telling(base, tuned), both.get("loss")) if measure]
    chats, prompts = run.held_out.get("kept"), tuned.get("prompts")
    parts = []
    for measure in told:
        some = measure.key in ANSWERED and prompts and chats and prompts < chats
        ends = interval(measure, run.differences.get(measure.key) or {})
        parts.append(
            (f"on {prompts:,} answered prompts " if some else "")
            + _change(measure, base[measure.key], tuned[measure.key])
            + (f" (95% interval {ends})" if ends and measure.key != "loss" else "")
        )
    where = f"on {chats:,} held-out chats" if chats else "on the held-out chats"
    return f"{_verdict(run, told, base, tuned)} {where}: {', '.join(parts)}."


def _verdict(run: RunFacts, told: Sequence[Measure], base: Mapping[str, Any], tuned: Mapping[str, Any]) -> str:
    """One word over the measures told; a change within its interval of chance counts for neither side."""
    ways = set()
    for measure in told:
        clear = run.differences.get(measure.key, {}).get("verdict") != UNCLEAR
        if clear and base[measure.key] != tuned[measure.key]:
            ways.add(measure.change(base[measure.key], tuned[measure.key])[1])
    return {frozenset([True]): "Better", frozenset([False]): "Worse", frozenset(): "No clear difference"}.get(
        frozenset(ways), "Mixed"
    )


def interval(measure: Measure, difference: Mapping[str, Any]) -> str:
    """`+24.0 to +38.0`; nothing where there were too few rows for one."""
    ends = [difference.get(end) for end in ("low", "high")]
    if not all(isinstance(end, (int, float)) and math.isfinite(end) for end in ends):
        return ""
    return " to ".join(measure.amount(float(end or 0), sign=True) for end in ends).replace("-", "−")


def telling(base: Mapping[str, Any], tuned: Mapping[str, Any]) -> Measure | None:
    """The measure beside the loss that says most about the answers, or about the tokens where none were asked for."""
    both = {measure.key: measure for measure in measured({"base": base, "tuned": tuned})}
    return next((both[key] for key in TELLING if key in both and (base[key] or tuned[key])), None)


def _change(measure: Measure, before: float, after: float) -> str:
    """`exact match rose from 0.0% to 96.3%`."""
    name, percent = measure.heading.partition(" (")[0], ""
    if name.endswith(" %"):
        name, percent = name.removesuffix(" %"), "%"
    if before == after:
        return f"{name} stayed at {_spell(measure, after)}{percent}"
    first, last = _spell(measure, before), _spell(measure, after)
    return f"{name} {VERBS[after > before]} from {first}{percent} to {last}{percent}"


def _spell(measure: Measure, value: float) -> str:
    """The loss with three figures that count; the rest as tables have it."""
    return f"{value:.3g}" if measure.key == "loss" else measure.amount(value)
