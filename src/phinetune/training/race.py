"""A race of candidates: rates first, then ranks, then epochs; each trains a little, and the better ones go on.

A candidate is a run in a folder of its own. It pauses with a checkpoint and goes on from it, as a run does that was
stopped, so no step is done twice and the winner is, to the bit, the run that its numbers, given by hand, would be.
Whatever stops a race, the study and the checkpoints are on disk, and the same call goes on.
"""

from __future__ import annotations

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

from phinetune.errors import RunError
from phinetune.files import remove
from phinetune.liveness import is_alive, is_on_this_host, named
from phinetune.run_folder import CONFIG, RunFolder
from phinetune.run_lock import LOCK, locked
from phinetune.training import halving
from phinetune.training.callbacks import StopRequest
from phinetune.training.halving import Decision
from phinetune.training.race_field import LEAD, RATE, Entry, Stage
from phinetune.training.stretches import SCORES, CandidateTrainer, Stretch
from phinetune.training.study import Candidate, Study

logger = logging.getLogger(__name__)

WAIT = 2.0  # seconds between looks at what other processes do


@dataclass
class Race:
    """The candidates of a run, trained until one is left.

    Attributes:
        entry: who runs, and what a look costs.
        study: where their numbers are kept.
        folder: where they are written.
        stop: ends the race before its end.
        trainer: trains the candidates.
        on_change: is told whenever something new is known.
    """

    entry: Entry
    study: Study
    folder: Path
    stop: StopRequest
    trainer: CandidateTrainer
    on_change: Callable[[Race], None] = lambda race: None
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
        scores = {one: self.entry.weighed(stage, known[one].values, known[one].scores) for one in numbers}
        return halving.decide(stage.total, stage.rungs, scores)

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
                        one = self.stretch(known[number], stage, rung)
                        with self.study.beating(number):
                            self.report(one, self.trainer.advance(one))
                        return True
        return False

    def stretch(self, one: Candidate, stage: Stage, rung: int) -> Stretch:
        """What a candidate trains next."""
        return Stretch(one.number, one.values, stage.rungs[rung].steps, stage.to_the_end)

    def report(self, one: Stretch, loss: float | None) -> None:
        """Tell the study what came of a stretch; None is nothing, since it was stopped."""
        if loss is not None:
            self.study.report(one.number, one.steps, loss)

    def _is_ours(self, one: Candidate) -> bool:
        """Whether this process may train a candidate: it began it, or the process that did has ended. Of a process on
        another host nothing is known but its signs of life.
        """
        if not one.owner or not is_on_this_host(one.owner):
            return not one.owner or one.is_stale
        return one.owner.get("pid") == os.getpid() or not is_alive(one.owner)

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
        return self.trainer.place(number)

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
        return f"{lead}; losses: {told}{self._held_back(stage, winner, known)}"

    def _held_back(self, stage: Stage, winner: int, known: Sequence[Candidate]) -> str:
        """Why one that led at its last look did not win, where there is one."""
        best = known[winner].scores
        looked = [(one, max(one.scores)) for one in known[stage.first : stage.end] if one.scores]
        ahead = [one.values for one, last in looked if one.scores[last] < best.get(last, -math.inf)]
        if stage.key != RATE or not any(map(self.entry.is_held_back, ahead)):
            return ""
        return f"; so early a rate above {self.entry.own(RATE):g} counts as better if it leads by {LEAD:.0%}"


def _plain(loss: float) -> float | None:
    return round(loss, 6) if math.isfinite(loss) else None


def _told(one: Candidate) -> str:
    if not one.scores:
        return "(not begun)"
    steps = max(one.scores)
    return f"{one.scores[steps]:.4f} (step {steps})"


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
