"""A race as verbs hold it: prepared, shown, run, and its winner made the run in output_dir."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from phinetune import processes
from phinetune.api.race_on_ray import field_on_ray
from phinetune.checkpoints.load import find_base
from phinetune.config.run import RunConfig
from phinetune.errors import ConfigError, RunError
from phinetune.files import remove
from phinetune.reporting.render import write_tuned
from phinetune.run_folder import TUNED, RunFolder, first_start
from phinetune.run_lock import locked
from phinetune.screen.console import Console, say
from phinetune.screen.data import show_data
from phinetune.screen.progress import ProgressLine
from phinetune.screen.settings import show_settings
from phinetune.screen.tune import show_race
from phinetune.training.callbacks import StopRequest
from phinetune.training.candidate import SharedBase, candidate
from phinetune.training.prepare import CHOSEN, PreparedRun, SettledRun, in_its_dtype, prepare_rows
from phinetune.training.race import Race, move_winner
from phinetune.training.race_field import Entry, Wish
from phinetune.training.race_on_ray import RaceOnRay
from phinetune.training.recorded import record_of
from phinetune.training.stretches import CandidateTrainer, Stretch
from phinetune.training.study import Candidate, Study, check_installed

STUDY = "study.db"


@dataclass
class Raced:
    """What came of a race.

    Attributes:
        folder: with the numbers of all candidates.
        winner: None if the race was stopped, or if another process has the winner.
        steps: that the candidate that came farthest has done.
        output: the run that the winner became.
        elsewhere: the process that has the winner, in words; empty if it is this one.
    """

    folder: Path
    output: RunFolder
    rows: PreparedRun
    base: SharedBase
    winner: Candidate | None = None
    steps: int = 0
    elsewhere: str = ""
    machine: dict[str, Any] = field(default_factory=dict)

    @property
    def stopped(self) -> bool:
        return self.winner is None and not self.elsewhere

    @property
    def has_begun(self) -> bool:
        """Whether the winner has a checkpoint to go on from."""
        return bool(self.output.checkpoints())

    def prepared(self) -> PreparedRun:
        """The winner's run, with what it chose when it began."""
        assert self.winner
        recorded = self.output.read_start().get(CHOSEN) if self.has_begun else None
        return candidate(self.rows, self.winner.values, self.output.path, recorded or self.machine)


def race_folder(output: Path) -> Path:
    """Where the candidates of a run are, beside it."""
    return output.with_name(f"{output.name}-tune")


def race(
    settled: SettledRun,
    wish: Wish,
    console: Console,
    stop: StopRequest,
    *,
    study: str | None = None,
    resume: bool,
    overwrite: bool,
    on_ray: RunConfig | None = None,
) -> Raced:
    """Run a race, or go on with it, and make its winner the run in output_dir, as far as it has come.

    Args:
        study: a file or a URL for the numbers; None is a file in the race's folder.
        on_ray: the run's configuration as it was given, to train the candidates on a Ray cluster; None: here.
        resume: go on with a race that is there.
        overwrite: replace the run in output_dir, and a race that is there.

    Raises:
        PhinetuneError: the race can't be held.
    """
    output, folder = RunFolder(settled.config.output_dir), race_folder(settled.config.output_dir)
    _check_place(output, folder, resume=resume, overwrite=overwrite)
    check_installed()
    places = [output.path, *sorted(folder.glob("candidate-*"))] if resume else []
    rows = prepare_rows(in_its_dtype(settled, first_start(places)))
    entry = Entry.of(rows, wish)
    show_data(rows.chats, rows.tokenizer, console)
    show_settings(entry.first.choices, console)
    say(console, entry.describe())
    _replace(folder, resume=resume, overwrite=overwrite)
    with field_on_ray(on_ray, rows.device, console) as cluster:
        held = _held(entry, folder, study, stop, console, cluster)
        raced = Raced(folder, output, rows, held.trainer.base, machine=entry.machine)
        try:
            winner = held.run()
        finally:
            if any(one.scores for one in held.study.candidates()):
                _write(held)
    show_race(held.to_tree(), console)
    raced.steps = max((max(one.scores, default=0) for one in held.study.candidates()), default=0)
    if winner is not None:
        _take(raced, held, winner, overwrite)
    return raced


def _check_place(output: RunFolder, folder: Path, *, resume: bool, overwrite: bool) -> None:
    if processes.count() > 1:
        raise ConfigError(
            "a race runs in one process; start it without a launcher, or give training_config.learning_rate a number"
        )
    moving = (folder / TUNED).is_file() and not output.is_finished
    if not (resume and moving):
        output.check_free(overwrite)
    if folder.exists() and not (resume or overwrite):
        raise RunError(
            f"{folder} holds a race that was begun before; go on with --resume, or begin anew with --overwrite"
        )


def _replace(folder: Path, *, resume: bool, overwrite: bool) -> None:
    if overwrite and not resume:
        remove(folder)
    folder.mkdir(parents=True, exist_ok=True)


def _held(
    entry: Entry, folder: Path, study: str | None, stop: StopRequest, console: Console, cluster: Mapping[str, Any]
) -> Race:
    first = entry.first
    opened = Study(
        study or str(folder / STUDY),
        first.config.output_dir.name,
        listed={number: {"learning_rate": one} for number, one in enumerate(entry.listed_rates)},
        ranges=entry.ranges,
        options=entry.options,
        field=entry.field(record_of(first, find_base(first.config.model).fingerprint)),
        seed=int(first.args.seed),
    )
    callbacks = partial(_told, console)
    trainer = CandidateTrainer(entry.rows, entry.machine, entry.part.places, folder, stop, callbacks)
    kind = RaceOnRay if cluster else Race
    return kind(entry, opened, folder, stop, trainer, _write, **cluster)


def _told(console: Console, one: Stretch, run: PreparedRun, to: int) -> Sequence[TrainerCallback]:
    """What is shown of a stretch of a candidate."""
    numbers = ", ".join(f"{key} {value:g}" for key, value in one.values.items())
    say(console, f"candidate {one.number}: {numbers}: to step {to} of {run.steps.count:,}")
    return [_Stretch(console)]


class _Stretch(ProgressLine):
    """The progress of a stretch, which takes itself away at its end."""

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self.close()


def _write(held: Race) -> None:
    """Write tune.json and the page, whole at any time."""
    RunFolder(held.folder).write_tuned(held.to_tree())
    write_tuned(held.folder)


def _take(raced: Raced, held: Race, winner: Candidate, overwrite: bool) -> None:
    """Make the winner the run in output_dir."""
    place, output = held.place(winner.number), raced.output
    if not place.is_dir() and not output.is_run and winner.scores:
        raced.elsewhere = f"candidate {winner.number}, was trained on {winner.owner.get('host', 'another host')}"
        return
    raced.winner = winner
    if place.is_dir():
        with locked(output.path):
            output.tidy()
            move_winner(place, output, held.to_tree(), _aside(raced, overwrite))


def _aside(raced: Raced, overwrite: bool) -> Callable[[], None]:
    def start() -> None:
        raced.output.check_free(overwrite)
        config = raced.prepared().config
        raced.output.start(config, config.model.revision)

    return start
