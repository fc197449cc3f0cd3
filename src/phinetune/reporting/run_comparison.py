"""What a comparison of several runs shows: results, settings that differ, and answers to the same prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from phinetune.metric_table import Measure, measures_of
from phinetune.reporting.facts import RunFacts
from phinetune.reporting.marking import Marked, mark
from phinetune.reporting.views import ANSWERS

SECTIONS = ("model", "data", "objective", "engine", "peft_config", "training_config")
ALWAYS_DIFFERS = "training_config.output_dir"


class ComparedRow(NamedTuple):
    """One measure or one setting.

    Attributes:
        values: one for each run, as text.
        best: for each run, whether its value is the best. All are false for a setting.
    """

    heading: str
    values: list[str]
    best: list[bool]


def headline(runs: Sequence[RunFacts]) -> str:
    """One sentence: which run has the lowest held-out loss, if all were measured on the same chats."""
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
    """Whether all measured runs were scored on the same held-out chats: the same file and as many labelled tokens."""
    scored_on = {_scored_on(run) for run in runs if _tuned(run)}
    return len(scored_on) < 2


def _scored_on(run: RunFacts) -> tuple[Any, Any]:
    return run.held_out.get("source"), _tuned(run).get("labelled_tokens")


def _tuned(run: RunFacts) -> Mapping[str, Any]:
    """The numbers of the run's tuned model; empty if it was not measured."""
    found: Mapping[str, Any] = run.comparison.get("tuned") or {}
    return found


def result_rows(runs: Sequence[RunFacts]) -> list[ComparedRow]:
    """One row for each measure that a run has. The best value is marked if two runs or more have the measure."""
    rows = []
    for measure in _measures(runs):
        values = [_tuned(run).get(measure.key) for run in runs]
        known = [value for value in values if value is not None]
        if known:
            best = (max if measure.more_is_better else min)(known)
            marks = [len(known) > 1 and value == best and min(known) != max(known) for value in values]
            rows.append(ComparedRow(measure.titled, ["—" if v is None else measure.amount(v) for v in values], marks))
    return rows


def _measures(runs: Sequence[RunFacts]) -> list[Measure]:
    """The measures that any run has."""
    own = {key: said for run in runs for key, said in (run.evaluated.get("own") or {}).items()}
    less, percents = ([key for key in own if own[key].get(what)] for what in ("less_is_better", "is_percent"))
    keys = list(dict.fromkeys(key for run in runs for key in _tuned(run)))
    return measures_of(keys, less, percents, {key: [_tuned(run).get(key) for run in runs] for key in keys})


def differing_settings(runs: Sequence[RunFacts]) -> list[ComparedRow]:
    """One row for each setting in which the runs differ. Settings have dotted names, as `peft_config.r`."""
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


class RunAnswer(NamedTuple):
    """The answer of one run's tuned model.

    Attributes:
        run: the run's place in the comparison, from 0.
        marked: the answer, with what differs from the reference marked.
        exact: whether the answer equals the reference, apart from white space at its ends.
    """

    run: int
    marked: Marked
    exact: bool


class SharedPrompt(NamedTuple):
    """A prompt that two or more runs answered."""

    prompt: str
    reference: str
    answers: list[RunAnswer]


def shared_answers(runs: Sequence[RunFacts]) -> list[SharedPrompt]:
    """The first prompts that two or more runs answered, with each tuned model's answer."""
    found: dict[tuple[str, str], list[RunAnswer]] = {}
    for number, run in enumerate(runs):
        for example in run.examples:
            text, reference = str((example.get("answers") or {}).get("tuned", "")), str(example.get("reference", ""))
            place = found.setdefault((str(example.get("prompt", "")), reference), [])
            place.append(RunAnswer(number, mark(text, reference), text.strip() == reference.strip()))
    return [SharedPrompt(*key, answers) for key, answers in found.items() if len(answers) > 1][:ANSWERS]
