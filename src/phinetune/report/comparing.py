"""Several runs side by side: their results, what differs in their settings, their answers to the same prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from phinetune.measures import measures_of
from phinetune.report.facts import RunFacts
from phinetune.report.marking import Marked, mark
from phinetune.report.views import ANSWERS

SECTIONS = ("model", "data", "engine", "peft_config", "training_config")
ALWAYS_DIFFERS = "training_config.output_dir"


class ComparedRow(NamedTuple):
    """One measure or setting: a value a run, and which of them are best (none for settings)."""

    heading: str
    values: list[str]
    best: list[bool]


def headline(runs: Sequence[RunFacts]) -> str:
    """Which run has the lowest held-out loss, where they were measured on the same chats."""
    losses = {run.name: loss for run in runs if (loss := _tuned(run).get("loss")) is not None}
    if len(losses) < 2:
        return f"{len(runs)} runs side by side; fewer than two were compared with their base on held-out chats."
    if not same_chats(runs):
        return f"{len(runs)} runs side by side, measured on different held-out chats: their losses do not compare."
    if len({f"{loss:.4f}" for loss in losses.values()}) == 1:
        return f"{len(losses)} runs side by side, level on the held-out chats: loss {next(iter(losses.values())):.4f}."
    best = min(losses, key=lambda name: losses[name])
    others = ", ".join(f"{loss:.4f} ({name})" for name, loss in losses.items() if name != best)
    return f"{best} is best on the held-out chats: loss {losses[best]:.4f}, against {others}."


def same_chats(runs: Sequence[RunFacts]) -> bool:
    """Whether every measured run was scored on the same file of held-out chats with as many labelled tokens."""
    seen = {_scored_on(run) for run in runs if _tuned(run)}
    return len(seen) < 2


def _scored_on(run: RunFacts) -> tuple[Any, Any]:
    return run.held_out.get("source"), _tuned(run).get("labelled_tokens")


def _tuned(run: RunFacts) -> Mapping[str, Any]:
    found: Mapping[str, Any] = run.comparison.get("tuned") or {}
    return found


def result_rows(runs: Sequence[RunFacts]) -> list[ComparedRow]:
    """A row a measure that any run has; the best value is marked where two or more have it."""
    rows = []
    for measure in measures_of(list(dict.fromkeys(key for run in runs for key in _tuned(run)))):
        values = [_tuned(run).get(measure.key) for run in runs]
        known = [value for value in values if value is not None]
        if known:
            best = (max if measure.more_is_better else min)(known)
            marks = [len(known) > 1 and value == best and min(known) != max(known) for value in values]
            rows.append(ComparedRow(measure.heading, ["—" if v is None else measure.amount(v) for v in values], marks))
    return rows


def differing_settings(runs: Sequence[RunFacts]) -> list[ComparedRow]:
    """The settings in which the runs differ, by dotted name."""
    flat = [_flat(run.config) for run in runs]
    names = dict.fromkeys(name for settings in flat for name in settings)
    rows = []
    for name in names:
        values = [settings.get(name, "—") for settings in flat]
        if len(set(values)) > 1 and name != ALWAYS_DIFFERS:
            rows.append(ComparedRow(name, values, [False] * len(runs)))
    return rows


def _flat(config: Mapping[str, Any]) -> dict[str, str]:
    return {
        f"{section}.{key}": str(value) for section in SECTIONS for key, value in (config.get(section) or {}).items()
    }


class MarkedAnswer(NamedTuple):
    """What one run answered, marked against the reference."""

    run: int
    marked: Marked
    exact: bool


class ShownPrompt(NamedTuple):
    """A prompt that two or more runs answered."""

    prompt: str
    reference: str
    answers: list[MarkedAnswer]


def shared_answers(runs: Sequence[RunFacts]) -> list[ShownPrompt]:
    """The first prompts that two or more runs answered, with each tuned model's answer."""
    found: dict[tuple[str, str], list[MarkedAnswer]] = {}
    for number, run in enumerate(runs):
        for example in run.examples:
            text, reference = str((example.get("answers") or {}).get("tuned", "")), str(example.get("reference", ""))
            place = found.setdefault((str(example.get("prompt", "")), reference), [])
            place.append(MarkedAnswer(number, mark(text, reference), text.strip() == reference.strip()))
    return [ShownPrompt(*key, answers) for key, answers in found.items() if len(answers) > 1][:ANSWERS]
