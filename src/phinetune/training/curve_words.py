"""What the curves of a run say, in words: over- or underfitted, flat, learnt by heart, spikes, too few rows.

docs/choices.md says when each is said. No model is needed, and no torch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

RISE = 0.02  # share by which the held-out loss must stand above its best
STILL_FALLING = 0.03  # share by which it must fall between the last two evaluations
FLAT = 0.03  # share by which the training loss must fall at least from the first quarter to the last
ROSE = 1.1  # the same, as a factor, from which it rose
BY_HEART = 0.1  # nats; a training loss below it is near 0
BY_HEART_FACTOR = 5.0  # the held-out loss must be so many times as large
BY_HEART_LEAST = 0.3  # nats; and at least this
LEAST_CHANGE = 0.005  # nats; a held-out loss near 0 that moves by less has neither risen nor fallen
FEW_ROWS = 50
FEWEST_ENTRIES = 8  # logged training losses, before anything is said of their course
SHOWN_SPIKES = 3


@dataclass(frozen=True)
class Words:
    """One thing that the curves say.

    Attributes:
        kind: overfitted, underfitted, flat, diverged, by_heart, spike, few_rows or sound.
    """

    kind: str
    text: str


@dataclass(frozen=True)
class Course:
    """The course of a run.

    Attributes:
        losses: (step, training loss) of each log step.
        held_out: (step, held-out loss) of each evaluation.
        spikes: as spikes.jsonl has them.
        rows: that were trained on; None for a stream.
        best_kept: the step of the checkpoint that the run ended with, if that is the best one; else None.
        likelihood: whether the loss is nats a token, of which 0 means knowing each token beforehand.
    """

    losses: Sequence[tuple[int, float]]
    held_out: Sequence[tuple[int, float]] = ()
    spikes: Sequence[Mapping[str, Any]] = field(default_factory=list)
    rows: int | None = None
    best_kept: int | None = None
    likelihood: bool = True


def read_course(metrics: Path, spikes: Path, **facts: Any) -> Course:
    """The course that the files of a run tell; lines that are broken are left out. `facts`: the other fields."""
    entries = _lines(metrics)
    losses = [(entry["step"], entry["loss"]) for entry in entries if _number(entry.get("loss"))]
    held_out = [(entry["step"], entry["eval_loss"]) for entry in entries if _number(entry.get("eval_loss"))]
    return Course(losses, held_out, _lines(spikes), **facts)


def _lines(file: Path) -> list[dict[str, Any]]:
    found = []
    for line in file.read_bytes().splitlines() if file.is_file() else []:
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict) and isinstance(entry.get("step"), int):
            found.append(entry)
    return sorted(found, key=lambda entry: int(entry["step"]))


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def curve_words(course: Course) -> list[Words]:
    """All that the curves say, the gravest first; empty if there is too little of them to say anything."""
    found = [_few_rows(course), _train(course), _by_heart(course), _overfitted(course), _underfitted(course)]
    said = [words for words in found if words]
    fitted = not {words.kind for words in said} - {"few_rows"}
    sound = _sound(course) if fitted else None
    return [*said, *([sound] if sound else []), *_spikes(course)]


def _few_rows(course: Course) -> Words | None:
    if course.rows is None or course.rows >= FEW_ROWS:
        return None
    rows = "1 row was" if course.rows == 1 else f"{course.rows} rows were"
    return Words("few_rows", f"Few rows: {rows} trained on. So few teach a form rather than a skill; add rows first.")


def _quarters(course: Course) -> tuple[float, float] | None:
    """The mean training loss of the first quarter of the run and of the last one."""
    losses = [loss for _, loss in course.losses]
    size = len(losses) // 4
    return (fmean(losses[:size]), fmean(losses[-size:])) if len(losses) >= FEWEST_ENTRIES else None


def _train(course: Course) -> Words | None:
    ends = _quarters(course)
    if ends is None:
        return None
    first, last = ends
    if last > ROSE * first and last > first + BY_HEART:
        text = f"Diverged: the training loss rose from {first:.3g} to {last:.3g}. Lower the learning rate."
        return Words("diverged", text)
    if last > (1 - FLAT) * first and first > BY_HEART:
        return Words(
            "flat",
            f"Hardly anything was learnt: the training loss went from {first:.3g} to {last:.3g}. Raise the learning "
            "rate or train longer, unless the base already answers so.",
        )
    return None


def _by_heart(course: Course) -> Words | None:
    if not (course.likelihood and course.held_out and course.losses):
        return None
    size = max(1, len(course.losses) // 10)
    train, held_out = fmean(loss for _, loss in course.losses[-size:]), course.held_out[-1][1]
    if train > BY_HEART or held_out < max(BY_HEART_LEAST, BY_HEART_FACTOR * train):
        return None
    return Words(
        "by_heart",
        f"Rows were learnt by heart: the training loss is {train:.3g}, and {held_out:.3g} on held-out chats. Train "
        "fewer epochs, or add rows.",
    )


def _overfitted(course: Course) -> Words | None:
    if len(course.held_out) < 2:
        return None
    step, best = min(course.held_out, key=lambda one: one[1])
    last_step, last = course.held_out[-1]
    if last - best <= max(RISE * best, LEAST_CHANGE):
        return None
    if course.best_kept is None:
        kept = "The run kept its last step; `load_best_model_at_end: true` keeps the best one."
    else:
        by = "" if course.best_kept == step else ", the best by `metric_for_best_model`"
        kept = f"The checkpoint of step {course.best_kept:,} is kept{by}."
    rise = f"the held-out loss was lowest at step {step:,} ({best:.4g}) and rose to {last:.4g} by step {last_step:,}"
    return Words("overfitted", f"Overfitted: {rise}. {kept}")


def _underfitted(course: Course) -> Words | None:
    if len(course.held_out) < 3:
        return None
    (before, higher), (last, lower) = course.held_out[-2:]
    least = max(STILL_FALLING * higher, LEAST_CHANGE)
    if higher - lower < least or lower > min(loss for _, loss in course.held_out):
        return None
    return Words(
        "underfitted",
        f"Underfitted: the held-out loss was still falling at the end, from {higher:.4g} at step {before:,} to "
        f"{lower:.4g} at step {last:,}. More epochs are likely to help.",
    )


def _sound(course: Course) -> Words | None:
    if len(course.held_out) < 3:
        return None
    (_, first), (last, lower) = course.held_out[0], course.held_out[-1]
    text = f"Sound: the held-out loss fell from {first:.4g} to {lower:.4g} by step {last:,} and has levelled off."
    return Words("sound", text) if lower < first else None


def _spikes(course: Course) -> list[Words]:
    highest = sorted(course.spikes, key=lambda spike: -float(spike["loss"]))[:SHOWN_SPIKES]
    told = []
    for spike in sorted(highest, key=lambda spike: int(spike["step"])):
        texts = spike.get("rows", [])
        places = [*spike.get("places", []), *([None] * len(texts))]  # older runs have none
        rows = " | ".join(
            f"{place}: {text!r}" if place else repr(text) for text, place in zip(texts, places, strict=False)
        )
        loss = f"the loss of step {spike['step']:,} was {spike['loss']:.3g}, where {spike['usual']:.3g} was usual"
        told.append(Words("spike", f"Spike: {loss}. Look at its rows: {rows}"))
    return told
