"""A race of candidates: rates first, then ranks, then epochs; each trains a little, and the better ones go on.

A candidate is a run in a folder of its own. It pauses with a checkpoint and goes on from it, as a run does that was
stopped, so no step is done twice and the winner is, to the bit, the run that its numbers, given by hand, would be.
Whatever stops a race, the study and the checkpoints are on disk, and the same call goes on.
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from torch.utils.data import Subset
from transformers import TrainerCallback

from phinetune.errors import RunError
from phinetune.files import remove, write_text
from phinetune.liveness import is_alive, is_on_this_host, named
from phinetune.run_folder import CONFIG, RunFolder
from phinetune.run_lock import LOCK, locked
from phinetune.training import halving
from phinetune.training.callbacks import Pause, StopRequest
from phinetune.training.candidate import SharedBase, candidate
from phinetune.training.finite import NotFiniteError
from phinetune.training.halving import Decision, Rung
from phinetune.training.prepare import CHOSEN, PreparedRun
from phinetune.training.race_field import Entry, Stage
from phinetune.training.run import RunPlace, open_place, train_run
from phinetune.training.study import Candidate, Study
from phinetune.training.trainer import RunTrainer

logger = logging.getLogger(__name__)

SCORES = "race-scores.json"  # of a candidate: its losses by steps, written before the checkpoint of that step
WAIT = 2.0  # seconds between looks at what other processes do


@dataclass
class Race:
    """The candidates of a run, trained until one is left.

    Attributes:
        entry: who runs, and what a look costs.
        study: where their numbers are kept.
        folder: where they are written.
        stop: ends the race before its end.
        callbacks: of a candidate's trainer; called for each stretch with the step that it goes to.
        on_change: is told whenever something new is known.
    """

    entry: Entry
    study: Study
    folder: Path
    stop: StopRequest
    callbacks: Callable[[Candidate, PreparedRun, int], Sequence[TrainerCallback]] = lambda one, run, to: ()
    on_change: Callable[[Race], None] = lambda race: None
    base: SharedBase = field(default_factory=SharedBase)
    winners: list[int] = field(default_factory=list)

    def run(self) -> Candidate | None:
        """The winner, or None if the race was stopped.

        Raises:
            RunError: no candidate has a loss that is a number.
        """
        winner: int | None = None
        for stage in self.entry.stages:
            self._list(stage, winner)
            winner = self._until_decided(stage, winner)
            if winner is None:
                return None
            self.winners.append(winner)
        assert winner is not None
        best = self.study.candidates()[winner]
        if best.scores and not math.isfinite(min(best.scores.values())):
            raise RunError("no candidate's loss is a number; name smaller rates, and look at the rows")
        if best.scores:
            self.study.finish(winner, best.scores[max(best.scores)])
        self.on_change(self)
        return best

    def _list(self, stage: Stage, winner: int | None) -> None:
        """Give the study the values of a stage's candidates: those of the winner so far, and one of them changed."""
        if winner is None:
            return
        values = dict(self.study.candidates()[winner].values)
        for number, option in zip(range(stage.first, stage.end), stage.options, strict=True):
            self.study.listed[number] = {**values, stage.key: option}

    def _until_decided(self, stage: Stage, before: int | None) -> int | None:
        last_told = ""
        while True:
            known = self.study.candidates()
            decision = self._decide(stage, before, known)
            self._free(decision, known)
            if decision.winner is not None:
                return decision.winner
            if self.stop.requested:
                return None
            if self._advance_one(stage, decision, known):
                self.on_change(self)
                continue
            if self._begins_one(stage, known):
                self.study.ask()
                continue
            last_told = self._tell_waiting(decision, known, last_told)
            time.sleep(WAIT)

    def _decide(self, stage: Stage, before: int | None, known: Sequence[Candidate]) -> Decision:
        numbers = [one.number for one in known if stage.first <= one.number < stage.end]
        numbers += [] if before is None else [before]
        return halving.decide(stage.total, stage.rungs, {one: known[one].scores for one in numbers})

    def _begins_one(self, stage: Stage, known: Sequence[Candidate]) -> bool:
        return len(known) < stage.end

    def _free(self, decision: Decision, known: Sequence[Candidate]) -> None:
        """Delete the files of those that are out. Their numbers stay in the study."""
        for number in decision.dropped:
            if known[number].state == "running":
                self.study.drop(number)
            remove(self.place(number))

    def _advance_one(self, stage: Stage, decision: Decision, known: Sequence[Candidate]) -> bool:
        """Train the first candidate that may train here up to its next look; false if there is none."""
        for number, rung in sorted(decision.ready.items()):
            if self._is_ours(known[number]):
                with ExitStack() as held:
                    if self._locks(number, held):
                        self.study.take_over(number)
                        self._advance(known[number], stage, stage.rungs[rung])
                        return True
        return False

    def _is_ours(self, one: Candidate) -> bool:
        """Whether this process may train a candidate: it began it, or the process that did has ended on this host."""
        mine = one.owner.get("pid") == os.getpid()
        return not one.owner or (is_on_this_host(one.owner) and (mine or not is_alive(one.owner)))

    def _locks(self, number: int, held: ExitStack) -> bool:
        """Lock a candidate's folder; false if another process has it."""
        place = self.place(number)
        try:
            held.enter_context(locked(place))
        except RunError:
            if (place / LOCK).is_file():
                return False
            raise
        return True

    def _tell_waiting(self, decision: Decision, known: Sequence[Candidate], told: str) -> str:
        whom = ", ".join(
            f"candidate {number} ({named(known[number].owner)})" for number in sorted(decision.ready) if known[number]
        )
        if whom and whom != told:
            logger.info("waiting for %s", whom)
        return whom

    def place(self, number: int) -> Path:
        """The folder of a candidate."""
        return self.folder / f"candidate-{number}"

    def prepared(self, one: Candidate, place: Path) -> PreparedRun:
        """The run of a candidate in its folder, with what it chose when it began."""
        recorded = RunFolder(place).read_start().get(CHOSEN) or self.entry.machine
        return candidate(self.entry.rows, one.values, place, recorded)

    def _advance(self, one: Candidate, stage: Stage, rung: Rung) -> None:
        """Train a candidate up to a look, and report its loss there."""
        place = self.place(one.number)
        known = read_scores(place)
        if str(rung.steps) not in known:
            self._train(one, place, stage, rung)
            known = read_scores(place)
        if str(rung.steps) in known:
            self.study.report(one.number, rung.steps, known[str(rung.steps)])

    def _train(self, one: Candidate, place: Path, stage: Stage, rung: Rung) -> None:
        run = self.prepared(one, place)
        scorer = Scorer(self.entry, place, rung.steps)
        pause = Pause(self.stop, run.steps.count, None) if stage.to_the_end else Pause(self.stop, rung.steps, scorer)
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
        if stage.to_the_end and not made.stopped:  # the run's best checkpoint is loaded by now
            scorer(rung.steps)
        scorer.trainer = None
        self.base.give_back(run, loaded, made.model)

    def _opened(self, run: PreparedRun, place: Path) -> RunPlace:
        begun = bool(RunFolder(place).checkpoints())
        return open_place(run.config, resume=begun, overwrite=not begun)

    @cached_property
    def _cost(self) -> dict[str, Any]:
        return asdict(self.entry.cost)

    def to_tree(self) -> dict[str, Any]:
        """What is known, as tune.json holds it."""
        known = self.study.candidates()
        return {
            "why": self.why(known),
            "rows": self.entry.part.rows,
            "held_out": self.entry.part.of,
            "cost": self._cost,
            "stages": [
                {
                    "key": stage.key,
                    "rungs": [asdict(rung) for rung in stage.rungs],
                    "winner": winner,
                    "first": stage.first,
                    "end": stage.end,
                }
                for stage, winner in zip(
                    self.entry.stages,
                    [*self.winners, *[None] * (len(self.entry.stages) - len(self.winners))],
                    strict=True,
                )
            ],
            "candidates": [
                {
                    "number": one.number,
                    "values": dict(one.values),
                    "losses": {str(steps): _plain(loss) for steps, loss in sorted(one.scores.items())},
                    "state": one.state,
                }
                for one in known
            ],
        }

    def why(self, known: Sequence[Candidate]) -> list[str]:
        """A line for each setting that was decided."""
        return [self._why(stage, winner, known) for stage, winner in zip(self.entry.stages, self.winners, strict=False)]

    def _why(self, stage: Stage, winner: int, known: Sequence[Candidate]) -> str:
        value = self.entry.value_of(known[winner].values, stage.key)
        told = ", ".join(
            f"{self.entry.value_of(one.values, stage.key):g} {_told(one)}"
            for one in known
            if one.number == winner or stage.first <= one.number < stage.end or one.number in self.winners
        )
        lead = f"{stage.key}: {value:g} won a race of {stage.total} on {self.entry.part.rows} held-out rows"
        return f"{lead}; losses: {told}"


def _plain(loss: float) -> float | None:
    return round(loss, 6) if math.isfinite(loss) else None


def _told(one: Candidate) -> str:
    if not one.scores:
        return "(not begun)"
    steps = max(one.scores)
    return f"{one.scores[steps]:.4f} (step {steps})"


@dataclass
class Scorer:
    """Scores a candidate on the part of the held-out rows that decides, and keeps the number beside its checkpoint."""

    entry: Entry
    place: Path
    steps: int
    trainer: RunTrainer | None = None

    def attach(self, trainer: RunTrainer) -> None:
        """Take the trainer of the stretch that begins."""
        self.trainer = trainer

    def __call__(self, step: int) -> None:
        assert self.trainer is not None
        rows: Any = self.trainer.eval_dataset
        places = self.entry.part.places
        self.write(self.trainer.score(rows if places is None else Subset(rows, places))["loss"])

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


def move(source: Path, target: Path) -> None:
    """Put a file or a folder of a candidate into its new place, over what is there."""
    if target.is_dir():
        remove(target)
    os.replace(source, target)


def move_winner(place: Path, output: RunFolder, tree: Mapping[str, Any], start: Callable[[], None]) -> None:
    """Make a candidate the run in `output`. A move that was interrupted is finished.

    Args:
        tree: what tune.json is to hold.
        start: sets an earlier run aside that is to be replaced.
    """
    if (place / CONFIG).is_file():
        if output.is_run:
            start()
        output.path.mkdir(parents=True, exist_ok=True)
        move(place / CONFIG, output.path / CONFIG)  # first: it says whose folder it is
    for entry in sorted(place.iterdir()):
        if entry.name not in (LOCK, SCORES):
            move(entry, output.path / entry.name)
    output.write_tuned(tree)
    remove(place)
