"""Trains a candidate of a race up to a step, scores it there, and stops it with a checkpoint to go on from."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch.utils.data import Subset
from transformers import TrainerCallback

from phinetune.files import write_text
from phinetune.run_folder import RunFolder
from phinetune.training.callbacks import Pause, StopRequest
from phinetune.training.candidate import SharedBase, candidate
from phinetune.training.finite import NotFiniteError
from phinetune.training.prepare import CHOSEN, PreparedRun
from phinetune.training.run import RunPlace, open_place, train_run
from phinetune.training.trainer import RunTrainer

logger = logging.getLogger(__name__)

SCORES = "race-scores.json"  # of a candidate: its losses by steps, written before the checkpoint of that step


@dataclass(frozen=True)
class Stretch:
    """A part of a candidate's training.

    Attributes:
        number: of the candidate; `values`: its settings, by key of the two dictionaries.
        steps: where it is scored.
        to_the_end: whether it trains to its own last step, and is scored there.
    """

    number: int
    values: Mapping[str, Any]
    steps: int
    to_the_end: bool


@dataclass
class CandidateTrainer:
    """Trains candidates, each in a folder of its own, one after the other on one base.

    Attributes:
        rows: the run with its rows, nothing chosen.
        machine: what all candidates have alike, by `section.key`.
        scored_on: the places of the held-out rows that decide; None is all.
        folder: where the candidates' folders are.
        stop: ends the race before its end.
        callbacks: of a candidate's trainer; called for each stretch with the step that it goes to.
    """

    rows: PreparedRun
    machine: Mapping[str, Any]
    scored_on: Sequence[int] | None
    folder: Path
    stop: StopRequest
    callbacks: Callable[[Stretch, PreparedRun, int], Sequence[TrainerCallback]] = lambda one, run, to: ()
    base: SharedBase = field(default_factory=SharedBase)

    def place(self, number: int) -> Path:
        """The folder of a candidate."""
        return self.folder / f"candidate-{number}"

    def advance(self, one: Stretch) -> float | None:
        """Train a candidate up to a step; its loss there, None if it was stopped before."""
        place, steps = self.place(one.number), str(one.steps)
        if steps not in read_scores(place):
            self._train(one, place)
        return read_scores(place).get(steps)

    def _prepared(self, one: Stretch, place: Path) -> PreparedRun:
        """The run of a candidate in its folder, with what it chose when it began."""
        recorded = RunFolder(place).read_start().get(CHOSEN) or self.machine
        return candidate(self.rows, one.values, place, recorded)

    def _train(self, one: Stretch, place: Path) -> None:
        run = self._prepared(one, place)
        scorer = _Scorer(self.scored_on, place, one.steps)
        pause = Pause(self.stop, run.steps.count, None) if one.to_the_end else Pause(self.stop, one.steps, scorer)
        loaded = self.base.take(run)
        try:
            made = train_run(
                run,
                self._opened(run, place),
                stop=pause,
                loaded=loaded,
                on_trainer=scorer.attach,
                callbacks=self.callbacks(one, run, pause.at),
            )
        except NotFiniteError as error:
            logger.warning("candidate %d: %s", one.number, error)
            scorer.write(math.inf)
            return
        if pause.asked:
            self.stop.requested = True
        if one.to_the_end and not made.stopped:  # the run's best checkpoint is loaded by now
            scorer(one.steps)
        scorer.trainer = None
        self.base.give_back(run, loaded, made.model)

    def _opened(self, run: PreparedRun, place: Path) -> RunPlace:
        begun = bool(RunFolder(place).checkpoints())
        return open_place(run.config, resume=begun, overwrite=not begun)


@dataclass
class _Scorer:
    """Scores a candidate on the held-out rows that decide, and keeps the number beside its checkpoint."""

    scored_on: Sequence[int] | None
    place: Path
    steps: int
    trainer: RunTrainer | None = None

    def attach(self, trainer: RunTrainer) -> None:
        """Take the trainer of the stretch that begins."""
        self.trainer = trainer

    def __call__(self, step: int) -> None:
        assert self.trainer is not None
        rows: Any = self.trainer.eval_dataset
        self.write(self.trainer.score(rows if self.scored_on is None else Subset(rows, self.scored_on))["loss"])

    def write(self, loss: float) -> None:
        """Keep a loss, whatever becomes of this process."""
        write_text(self.place / SCORES, json.dumps({**read_scores(self.place), str(self.steps): loss}))


def read_scores(place: Path) -> dict[str, float]:
    """The losses of a candidate by steps. Where a checkpoint is missing, its steps are done again, to the bit."""
    try:
        found: dict[str, float] = json.loads((place / SCORES).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found
