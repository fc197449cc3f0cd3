"""Reads a run's folder.

The run may be finished, running or stopped. Lines of its files may be broken, and files may be missing.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from phinetune.config.yaml_text import read_yaml
from phinetune.errors import ConfigError, RunError
from phinetune.liveness import is_alive
from phinetune.run_folder import CONFIG, EVALUATION, METRICS, RESULTS, SAMPLES, START, TUNED, RunFolder, told_changes

SHOWN_LINES = 5  # most broken lines of a file that a note lists


@dataclass(frozen=True)
class RunFacts:
    """What the files of a run say. Every dictionary may be empty.

    Attributes:
        name: the folder's name. If several runs shown together have the same name, the folder's path.
        state: `finished`, `running` or `stopped`.
        config: the sections of config.yaml.
        start: start.json, with base, data, steps and environment.
        results: results.json, which exists once a run has ended.
        later: evaluation.json, from an evaluation made after the run.
        entries, samples: the readable lines of metrics.jsonl and samples.jsonl, in the order of their steps.
        notes: what a reader must know: what could not be read, and with what changes the run was resumed.
        tuned: tune.json, of a run that won a race.
    """

    path: Path
    name: str
    state: str
    config: Mapping[str, Any]
    start: Mapping[str, Any]
    results: Mapping[str, Any]
    later: Mapping[str, Any]
    entries: Sequence[Mapping[str, Any]]
    samples: Sequence[Mapping[str, Any]]
    notes: Sequence[str]
    tuned: Mapping[str, Any] = field(default_factory=dict)

    @property
    def base(self) -> Mapping[str, Any]:
        """The base model's path and revision, as far as they are recorded."""
        recorded: Mapping[str, Any] = self.results.get("base") or self.start.get("base") or {}
        return recorded or {"path": (self.config.get("model") or {}).get("path", "unknown")}

    @property
    def data(self) -> Mapping[str, Any]:
        """What happened to the rows of the training, held-out and test sets."""
        recorded: Mapping[str, Any] = self.results.get("data") or self.start.get("data") or {}
        return recorded

    @property
    def evaluated(self) -> Mapping[str, Any]:
        """The results with the evaluation to show first: the run's own, or the later ones if it made none."""
        return self.later if self.later.get("evaluation") and not self.results.get("evaluation") else self.results

    @property
    def comparison(self) -> Mapping[str, Any]:
        """The evaluation: each model's numbers, first the base's."""
        found: Mapping[str, Any] = self.evaluated.get("evaluation") or {}
        return found

    @property
    def differences(self) -> Mapping[str, Mapping[str, Any]]:
        """For each measure, the change with its interval and a verdict. Empty if they were not computed."""
        found: Mapping[str, Mapping[str, Any]] = self.evaluated.get("differences") or {}
        return found

    @property
    def held_out(self) -> Mapping[str, Any]:
        """What happened to the rows that were evaluated."""
        data = self.later.get("data") if self.evaluated is self.later else self.data
        found: Mapping[str, Any] = (data or {}).get("test") or (data or {}).get("held_out") or {}
        return found

    @property
    def measured_on(self) -> str:
        """What the rows that were evaluated are called: those of the final verdict are test chats."""
        return "test chats" if self.evaluated is not self.later and self.data.get("test") else "held-out chats"

    @property
    def overlap(self) -> Mapping[str, Any]:
        """How many of the rows that were evaluated were trained on. Empty if that was not looked at."""
        data = self.later.get("data") if self.evaluated is self.later else self.data
        found: Mapping[str, Any] = (data or {}).get("overlap") or {}
        return found

    @property
    def examples(self) -> Sequence[Mapping[str, Any]]:
        """The prompts that were answered, with references and answers."""
        found: Sequence[Mapping[str, Any]] = self.evaluated.get("examples") or []
        return found

    @property
    def steps(self) -> tuple[int, int | None]:
        """Steps done, as far as they are logged, and steps planned; None if that is unknown."""
        logged = max((int(entry["step"]) for entry in self.entries), default=0)
        return int((self.results.get("training") or {}).get("steps") or logged), self.start.get("steps")


def read_run(path: str | Path) -> RunFacts:
    """Read a run's folder.

    Raises:
        RunError: there is no run at `path`.
    """
    folder = RunFolder(Path(path).expanduser())
    if not folder.is_run:
        missing = "no such folder" if not folder.path.exists() else "no run of phinetune (its config.yaml is missing)"
        raise RunError(f"{path}: {missing}; name the output_dir of a training run")
    notes: list[str] = []
    start, results, later = (_read_json(folder.path / name, notes) for name in (START, RESULTS, EVALUATION))
    entries, samples = (_read_lines(folder.path / name, notes) for name in (METRICS, SAMPLES))
    notes += [*told_changes(start.get("changed")), *_told_skipped(results)]
    state = "finished" if folder.is_finished else "running" if _runs_elsewhere(start) else "stopped"
    name = folder.path.resolve().name
    return RunFacts(
        *(folder.path, name, state, _read_config(folder, notes), start, results, later, entries, samples, notes),
        tuned=_read_json(folder.path / TUNED, notes),
    )


def read_runs(paths: Sequence[str | Path]) -> list[RunFacts]:
    """Read several runs, and give them names that differ.

    Raises:
        RunError: some paths hold no run. The error names them all.
    """
    runs, problems = [], []
    for path in paths:
        try:
            runs.append(read_run(path))
        except RunError as error:
            problems += error.problems
    if problems:
        raise RunError(problems)
    names = Counter(run.name for run in runs)
    return [replace(run, name=str(run.path)) if names[run.name] > 1 else run for run in runs]


def _told_skipped(results: Mapping[str, Any]) -> list[str]:
    steps = (results.get("training") or {}).get("skipped_steps") or []
    if not steps:
        return []
    listed = ", ".join(map(str, steps[:SHOWN_LINES])) + (" …" if len(steps) > SHOWN_LINES else "")
    return [f"Steps that changed nothing, since their loss or gradients were not finite: {len(steps)} ({listed})."]


def _runs_elsewhere(start: Mapping[str, Any]) -> bool:
    """Whether another process still trains the run. If this process trained it, training is over by now."""
    process = start.get("process") or {}
    return process.get("pid") != os.getpid() and is_alive(process)


def _read_config(folder: RunFolder, notes: list[str]) -> Mapping[str, Any]:
    try:
        tree = read_yaml((folder.path / CONFIG).read_text(encoding="utf-8"), CONFIG)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, ConfigError) as error:
        notes.append(f"{CONFIG} can't be read: {error}")
        return {}
    return tree if isinstance(tree, dict) else {}


def _read_json(file: Path, notes: list[str]) -> Mapping[str, Any]:
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        notes.append(f"{file.name} can't be read: {error}")
        return {}
    return tree if isinstance(tree, dict) else {}


def _read_lines(file: Path, notes: list[str]) -> list[Mapping[str, Any]]:
    try:
        lines = file.read_bytes().splitlines()
    except FileNotFoundError:
        return []
    entries, broken = [], []
    for number, line in enumerate(lines, 1):
        entry = _entry(line)
        if entry is None:
            broken.append(number)
        else:
            entries.append(entry)
    if broken:
        more = f" and {len(broken) - SHOWN_LINES} more" if len(broken) > SHOWN_LINES else ""
        listed = ", ".join(map(str, broken[:SHOWN_LINES]))
        lines_word, be = ("line", "is") if len(broken) == 1 else ("lines", "are")
        notes.append(f"{file.name}: {lines_word} {listed}{more} can't be read and {be} left out")
    return sorted(entries, key=lambda entry: int(entry["step"]))


def _entry(line: bytes) -> Mapping[str, Any] | None:
    """The entry in a line; None if the line is not a JSON object with a step."""
    try:
        entry = json.loads(line)
    except (UnicodeDecodeError, json.JSONDecodeError):
        return None
    return entry if isinstance(entry, dict) and type(entry.get("step")) is int else None
