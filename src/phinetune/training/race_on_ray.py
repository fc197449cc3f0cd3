"""A race whose candidates train on a Ray cluster, several at a time.

The study stays with the process that holds the race. A stretch of a candidate is a task of Ray: where it runs and what
becomes of it when a node is lost is Ray's work, and since a stretch goes on from its checkpoint, Ray may try it again.
All nodes share the file system in which the run's folder lies. What decides is the same as without Ray: the values of
candidates that optuna looks for are asked for when all before them are scored, as one process does it.
"""

from __future__ import annotations

import json
import logging
import socket
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from phinetune.config.places import with_absolute_places
from phinetune.config.run import RunConfig, make_config
from phinetune.data.read.held_data import is_held_name
from phinetune.errors import ConfigError, PhinetuneError, RunError, reason_of
from phinetune.ray_cluster import Share
from phinetune.run_lock import LOCK
from phinetune.training.callbacks import StopRequest
from phinetune.training.halving import Decision
from phinetune.training.prepare import prepare_rows, settle
from phinetune.training.race import WAIT, Race
from phinetune.training.race_field import Stage
from phinetune.training.stretches import CandidateTrainer, Stretch
from phinetune.training.study import Candidate
from phinetune.version import VERSION

logger = logging.getLogger(__name__)

STOP = "stop"  # a file in the race's folder: candidates stop after their step, with a checkpoint
ONE = Share(1)
TRIES = 3  # of a stretch after the first, where its process or its node was lost


@dataclass
class RaceOnRay(Race):
    """A race on a Ray cluster.

    Attributes:
        config: of the run, as it was given.
        ray: the module, connected.
        share: what one candidate takes of a node.
        on_sent: is called with each stretch that is given to Ray, and on_done with where it was trained.
    """

    config: RunConfig = field(default_factory=RunConfig)
    ray: Any = None
    share: Share = ONE
    on_sent: Callable[[Stretch], None] = lambda one: None
    on_done: Callable[[Stretch, Mapping[str, Any]], None] = lambda one, answer: None
    _out: dict[Any, _Sent] = field(default_factory=dict)

    def run(self) -> Candidate | None:
        with self.stop.listening():
            self._stop_file.unlink(missing_ok=True)
            try:
                return super().run()
            finally:
                self._call_back()

    def _advance_one(self, stage: Stage, decision: Decision, known: Sequence[Candidate]) -> bool:
        """Send out all that may train; wait for one of them, unless a further candidate can begin meanwhile."""
        for number, rung in sorted(decision.ready.items()):
            if number not in self._numbers and self._is_ours(known[number]):
                self._send(self.stretch(known[number], stage, rung))
        if len(known) in self.study.listed and self._begins_one(stage, known):
            return False
        return self._collect_one()

    @property
    def _numbers(self) -> set[int]:
        return {sent.stretch.number for sent in self._out.values()}

    @property
    def _stop_file(self) -> Path:
        return self.folder / STOP

    def _send(self, one: Stretch) -> None:
        with ExitStack() as held:
            if not self._locks(one.number, held):
                return
            self.study.take_over(one.number)
            options = {"num_cpus": self.share.cpus, "num_gpus": self.share.gpus, "max_retries": TRIES}
            remote = self.ray.remote(train_stretch).options(name=f"candidate {one.number}", **options)
            task = remote.remote(self._run, json.dumps({**asdict(one), "cpus": self.share.cpus}))
            self._out[task] = _Sent(one, held.pop_all())
        self.on_sent(one)

    @property
    def _run(self) -> str:
        """What a node has to know of the race. A device or dtype that was chosen here is taken there: candidates are
        compared with each other, and the winner is finished here.
        """
        config = with_absolute_places(self.config)
        config.training_config["output_dir"] = str(self.config.output_dir.resolve())
        rows = self.trainer.rows
        chosen = {"device": rows.device.type, "dtype": str(rows.dtype).removeprefix("torch.")}
        config.model = config.model.model_copy(update=chosen)
        return json.dumps(
            {
                "version": VERSION,
                "config": config.model_dump(mode="json"),
                "machine": dict(self.trainer.machine),
                "scored_on": self.trainer.scored_on,
                "folder": str(self.folder.resolve()),
            }
        )

    def _collect_one(self) -> bool:
        """Wait for a stretch and report it, unless the race is to stop; false if none is out."""
        while self._out and not self.stop.requested:
            done, _ = self.ray.wait(list(self._out), num_returns=1, timeout=WAIT)
            if done:
                self._take(done[0])
                return True
        return bool(self._out)

    def _take(self, task: Any) -> None:
        sent = self._out.pop(task)
        with sent.held:
            answer = self._answer(task, sent.stretch)
            if "problems" in answer:
                raise RunError([f"candidate {sent.stretch.number}: {one}" for one in answer["problems"]])
            self.on_done(sent.stretch, answer)
            self.report(sent.stretch, answer["loss"])

    def _answer(self, task: Any, one: Stretch) -> dict[str, Any]:
        try:
            return dict(json.loads(self.ray.get(task)))
        except self.ray.exceptions.RayError as error:
            raise RunError(f"candidate {one.number}: Ray could not train it: {reason_of(error, 500)}") from error

    def _call_back(self) -> None:
        """Let all that train finish their step and save; what they found until then is kept."""
        if not self._out:
            return
        self._stop_file.touch()
        while self._out:
            done, _ = self.ray.wait(list(self._out), num_returns=1, timeout=WAIT)
            for task in done:
                try:
                    self._take(task)
                except RunError as error:  # another one is on its way to the user
                    logger.warning("%s", error)
        self._stop_file.unlink(missing_ok=True)


@dataclass
class _Sent:
    """A stretch that was given to Ray, and the lock of its folder, which this process holds meanwhile."""

    stretch: Stretch
    held: ExitStack


def check_travels(config: RunConfig) -> None:
    """Make sure that other machines can read what a configuration names.

    Raises:
        ConfigError: it names what this program holds in its memory.
    """
    names = [one for one in _texts(config.model_dump(mode="json")) if is_held_name(one)]
    if names:
        why = "it is in this program's memory, which a Ray cluster does not see; write it to a file that all nodes see"
        raise ConfigError([f"{one}: {why}" for one in names])


def _texts(tree: Any) -> list[str]:
    if isinstance(tree, Mapping):
        tree = list(tree.values())
    if isinstance(tree, list):
        return [text for one in tree for text in _texts(one)]
    return [tree] if isinstance(tree, str) else []


def train_stretch(run: str, task: str) -> str:
    """Train a stretch on a node: what Ray calls there.

    Args:
        run: what all stretches of a race have alike, as JSON.
        task: the stretch and `cpus`, as JSON.

    Returns:
        JSON with `loss` (None: it was stopped) and `host`; or `problems`, what a user can mend.
    """
    import torch

    given = json.loads(task)
    torch.set_num_threads(given.pop("cpus"))
    try:
        loss = _trainer(run).advance(_checked(Stretch(**given), json.loads(run)))
    except PhinetuneError as error:
        return json.dumps({"problems": [f"on {socket.gethostname()}: {one}" for one in error.problems]})
    return json.dumps({"loss": loss, "host": socket.gethostname()})


def _checked(one: Stretch, run: Mapping[str, Any]) -> Stretch:
    """The stretch, if this node can train it.

    Raises:
        RunError: it has another version of this package, or does not see the race's folder.
    """
    if run["version"] != VERSION:
        raise RunError(f"phinetune {VERSION} is installed there, and {run['version']} here")
    place = Path(run["folder"]) / f"candidate-{one.number}"
    if not (place / LOCK).is_file():
        raise RunError(f"{place} is not seen there; output_dir has to lie on a file system that all nodes share")
    return one


@lru_cache(maxsize=1)
def _trainer(run: str) -> CandidateTrainer:
    """The rows and the base, which a process of Ray keeps for the race's next stretch."""
    given = json.loads(run)
    folder = Path(given["folder"])
    rows = prepare_rows(settle(make_config(given["config"])))
    return CandidateTrainer(rows, given["machine"], given["scored_on"], folder, StopByFile(folder / STOP))


class StopByFile(StopRequest):
    """Asked to stop by a file, since the process that asks is on another machine."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.file = file

    def is_asked_elsewhere(self) -> bool:
        return self.file.exists()
