"""`curve`: a run on growing shares of its rows, what doubling the rows is likely to give, and what is learnt worst."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from phinetune.api.before import look_at_rows, look_at_settings
from phinetune.api.sections import DataValue, SectionValue, holds_data, make_sections
from phinetune.api.train import train_config
from phinetune.checkpoints.load import find_base
from phinetune.checkpoints.untouched import untouched_base
from phinetune.config.run import RunConfig
from phinetune.durations import spell_seconds
from phinetune.engine.scoring import Score, score_rows
from phinetune.errors import RunError
from phinetune.evaluation.drawn_together import group_sentences, units_of
from phinetune.evaluation.hard_rows import hard_rows
from phinetune.evaluation.trust import few_rows
from phinetune.files import write_text
from phinetune.logs import quiet_libraries
from phinetune.reporting.data_curve_page import write_curve_page
from phinetune.run_folder import RunFolder, first_start
from phinetune.run_lock import locked
from phinetune.screen.console import Console, say, silent, stderr
from phinetune.screen.data_curve import show_data_curve
from phinetune.training.data_curve import Point, curve_tree
from phinetune.training.data_shares import SHARES, ShareRun, check_curve, share_runs, told_recipe
from phinetune.training.prepare import CHOSEN, PreparedRun, in_its_dtype, prepare_run, settle
from phinetune.training.race_field import BY_MEMORY
from phinetune.training.recorded import record_of
from phinetune.training.resuming import what_differs
from phinetune.training.run import TrainedRun

CURVE = "curve.json"
PAGE = "curve.html"
BASE = "base"


@dataclass(frozen=True)
class DataCurve:
    """A curve as `curve` leaves it.

    Attributes:
        path: its folder: a run for each share, curve.json, and the page curve.html.
        results: what curve.json holds.
        stopped: whether it was asked to stop before its end; the same call goes on.
    """

    path: Path
    results: dict[str, Any]
    stopped: bool


@holds_data
def curve(
    model: SectionValue = None,
    data: DataValue = None,
    peft_config: Mapping[str, Any] | None = None,
    training_config: Mapping[str, Any] | None = None,
    evaluation: Mapping[str, Any] | None = None,
    *,
    objective: SectionValue = None,
    engine: SectionValue = None,
    out: str | Path | None = None,
    overwrite: bool = False,
    console: Console | None = None,
) -> DataCurve:
    """Train on an eighth, a quarter, half and all of the rows, and say what doubling them is likely to give.

    What is finished in `out` is kept: after a stop the same call goes on.

    Args:
        model, data, peft_config, training_config, evaluation, objective, engine: see `train`.
        out: the folder of the curve; `training_config["output_dir"]` with `-curve` behind it if left out.
        overwrite: begin anew where `out` holds a curve.
        console: where to print; standard error if left out.

    Raises:
        PhinetuneError: anything a user can mend.
    """
    config = make_sections(
        model=model,
        data=data,
        peft_config=peft_config,
        training_config=training_config,
        evaluation=evaluation,
        objective=objective,
        engine=engine,
    )
    return curve_config(config, console or stderr(), out=out, overwrite=overwrite)


def curve_config(
    config: RunConfig, console: Console, *, out: str | Path | None = None, overwrite: bool = False
) -> DataCurve:
    """`curve` for a validated configuration."""
    quiet_libraries()
    folder = Path(out).expanduser() if out else config.output_dir.with_name(f"{config.output_dir.name}-curve")
    settled = in_its_dtype(settle(config), {} if overwrite else first_start(folder / name for name in SHARES))
    metrics = look_at_settings(settled)
    whole = prepare_run(settled, {} if overwrite else _chosen_before(folder))
    check_curve(whole)
    look_at_rows(whole, metrics)
    runs = share_runs(whole)
    _check_folder(folder)
    with locked(folder):
        return _Curve(folder, whole, runs, overwrite, console).draw()


def _chosen_before(folder: Path) -> dict[str, Any]:
    """What a curve that goes on chose by the memory that was free when it began.

    Raises:
        RunError: its file is damaged.
    """
    file = folder / CURVE
    try:
        chosen = json.loads(file.read_text(encoding="utf-8")).get(CHOSEN) if file.is_file() else None
    except (ValueError, AttributeError):
        raise RunError(f"{file}: damaged: it is no JSON of a curve; delete it, or take --overwrite") from None
    return chosen or {}


def _check_folder(folder: Path) -> None:
    """Make sure that a curve may be written there.

    Raises:
        RunError: something else is there.
    """
    if folder.is_dir() and not (folder / CURVE).is_file() and any(not p.name.startswith(".") for p in folder.iterdir()):
        raise RunError(f"{folder} holds files that no curve wrote; name an empty or new folder with --out")
    if folder.exists() and not folder.is_dir():
        raise RunError(f"{folder} is a file; name a folder with --out")


@dataclass
class _Curve:
    """A curve at work. Its folder is locked."""

    folder: Path
    whole: PreparedRun
    runs: list[ShareRun]
    overwrite: bool
    console: Console

    def draw(self) -> DataCurve:
        """Train what is not finished, then say what all of it shows."""
        for one in self.runs:
            one.config.training_config["output_dir"] = str(self.folder / one.name)
        say(self.console, told_recipe(self.whole))
        finished = [] if self.overwrite else [one.name for one in self.runs if self._is_finished(one)]
        if finished:
            say(self.console, f"Finished before: {', '.join(finished)}")
        if self.overwrite or not (self.folder / CURVE).is_file():
            self._write({"runs": [one.name for one in self.runs], "points": [], CHOSEN: self._by_memory()})
        for number, one in enumerate(self.runs, 1):
            if one.name in finished:
                continue
            rows = round(one.share * self.whole.chats.train.report.kept)
            say(self.console, f"Run {number} of {len(self.runs)}: {one.name.replace('-', ' ')}, about {rows:,} rows")
            if self._train(one):
                return DataCurve(self.folder, self._read(CURVE), True)
        return DataCurve(self.folder, self._tell(), False)

    def _by_memory(self) -> dict[str, Any]:
        """What the memory that is free has decided."""
        return {key: value for key, value in self.whole.chosen.items() if key in BY_MEMORY}

    def _is_finished(self, one: ShareRun) -> bool:
        """Whether a run of the very same rows and settings has ended there and was scored.

        Raises:
            RunError: a run of other rows or settings is there.
        """
        run = RunFolder(self.folder / one.name)
        decides = run.read_start().get("decides")
        if not isinstance(decides, dict) or not run.is_run:
            return False
        prepared = prepare_run(settle(one.config))
        differing = what_differs(decides, record_of(prepared, find_base(prepared.config.model).fingerprint))
        if differing:
            raise RunError(
                [
                    *(f"{run.path}: {sentence}" for sentence in differing),
                    "the curve there was begun with other rows or settings; name another folder with --out, or begin "
                    "anew with --overwrite",
                ]
            )
        return run.is_finished and self._scores_file(one.name).is_file() and self._scores_file(BASE).is_file()

    def _train(self, one: ShareRun) -> bool:
        """Train a run, from its newest checkpoint if there is one. Returns whether it was stopped."""
        run, began = RunFolder(self.folder / one.name), time.monotonic()
        if self.overwrite:
            with suppress(FileNotFoundError):
                self._scores_file(one.name).unlink()
        resume = not self.overwrite and run.is_run and not run.is_finished and bool(run.checkpoints())
        made = train_config(
            one.config,
            silent(),
            resume=resume,
            overwrite=not resume,
            progress=self.console,
            on_trained=partial(self._score, one.name),
        )
        if not made.stopped:
            loss = _loss(self._scores(one.name))
            say(self.console, f"  held-out loss {loss:.4f}, in {spell_seconds(time.monotonic() - began)}")
        return made.stopped

    def _score(self, name: str, trained: TrainedRun) -> None:
        """Keep the scores of the held-out rows by a trained model, and by its base where they are not there yet."""
        held_out = self.whole.chats.held_out
        assert held_out
        size = trained.prepared.config.evaluation.batch_size
        rows, batch = held_out.encoded, None if size == "auto" else int(size)
        if not self._scores_file(BASE).is_file() or self.overwrite:
            with untouched_base(trained.model, trained.loaded, trained.prepared.config.model) as base:
                self._write_scores(BASE, score_rows(base, rows, batch))
        self._write_scores(name, score_rows(trained.model, rows, batch))

    def _scores_file(self, name: str) -> Path:
        return self.folder / f"scores-{name}.json"

    def _write_scores(self, name: str, scores: list[Score]) -> None:
        tree = [[one.nll, one.correct, one.tokens] for one in scores]
        write_text(self._scores_file(name), json.dumps(tree) + "\n", private=True)

    def _scores(self, name: str) -> list[Score]:
        return [Score(*one) for one in json.loads(self._scores_file(name).read_text(encoding="utf-8"))]

    def _tell(self) -> dict[str, Any]:
        """What all runs together show: on the terminal, in curve.json and on a page."""
        held_out = self.whole.chats.held_out
        assert held_out
        scores = {one.name: self._scores(one.name) for one in self.runs}
        points = [self._point(one, scores[one.name]) for one in self.runs]
        base = self._scores(BASE)
        tree = curve_tree(points, _loss(base))
        for entry, one in zip(tree["points"], self.runs, strict=True):
            training = self._results(one)["training"]
            entry |= {"name": one.name, "share": one.share, "steps": training["steps"], "seconds": training["seconds"]}
        tree["held_out"] = held_out.report.to_dict()
        last = [scores[one.name] for one in self.runs[-2:]]
        tree["hard"] = hard_rows(base, last[1], held_out, before=last[0])
        tree["flags"] = [*few_rows(len(held_out)), *group_sentences(held_out)]
        tree = {"runs": [one.name for one in self.runs], **tree, CHOSEN: self._by_memory()}
        self._write(tree)
        show_data_curve(tree, self.console)
        write_curve_page(tree, self.folder.resolve().name, self.folder / PAGE)
        return tree

    def _results(self, one: ShareRun) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(RunFolder(self.folder / one.name).results.read_text(encoding="utf-8"))
        return found

    def _point(self, one: ShareRun, scores: list[Score]) -> Point:
        rows, held_out = int(self._results(one)["data"]["train"]["kept"]), self.whole.chats.held_out
        units = units_of(held_out) if held_out else None
        return Point(rows, [score.nll for score in scores], [score.tokens for score in scores], units)

    def _write(self, tree: dict[str, Any]) -> None:
        write_text(self.folder / CURVE, json.dumps(tree, indent=2, ensure_ascii=False) + "\n", private=True)

    def _read(self, name: str) -> dict[str, Any]:
        tree: dict[str, Any] = json.loads((self.folder / name).read_text(encoding="utf-8"))
        return tree


def _loss(scores: list[Score]) -> float:
    return sum(scores, Score()).loss
