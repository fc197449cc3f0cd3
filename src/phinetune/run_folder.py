"""The folder of a run: which files it holds, whether a run may be written there, and where a stopped run goes on."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phinetune.config.places import with_absolute_places
from phinetune.config.run import RunConfig, dump_config, load_config
from phinetune.errors import RunError, at_most, reason_of
from phinetune.files import remove, write_text
from phinetune.manifest import MANIFEST, damage, has_manifest
from phinetune.replaced_run import FOLDERS, drop, set_aside, settle
from phinetune.run_lock import LOCK
from phinetune.secret_text import tree_without_secrets

logger = logging.getLogger(__name__)

CONFIG = "config.yaml"
METRICS = "metrics.jsonl"
SAMPLES = "samples.jsonl"
SPIKES = "spikes.jsonl"
LOG = "run.log"
START = "start.json"
RESULTS = "results.json"
EVALUATION = "evaluation.json"
TUNED = "tune.json"  # the candidates of which this run is the winner
CARD = "README.md"
REPORT = "report.html"
MARK = "# A run of phinetune, its configuration with every value in force.\n"
ADAPTER = "adapter_model.safetensors"
OPTIMIZER = "optimizer.pt"
# The files that a run needs to go on from a checkpoint. A checkpoint gets its name in one rename, when it is complete.
RESUMABLE = (ADAPTER, OPTIMIZER, "scheduler.pt", "trainer_state.json")
DEEPSPEED = "latest"  # names the folder in which DeepSpeed keeps what its optimizer knows, in place of OPTIMIZER
RANDOM = "rng_state*.pth"  # one for each process; without it a run goes on with other numbers
OWN_FILES = (
    CONFIG,
    METRICS,
    SAMPLES,
    SPIKES,
    LOG,
    START,
    RESULTS,
    EVALUATION,
    TUNED,
    CARD,
    REPORT,
    "adapter_config.json",
    ADAPTER,
    MANIFEST,
    "base.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)
# What a process that was killed leaves of a file or a folder that it never published.
LEFTOVER = re.compile(
    rf"\.({'|'.join(map(re.escape, (*OWN_FILES, LOCK)))})\.[a-z0-9_]{{8}}"  # of `write_lines`
    r"|\.(adapter|checkpoint-\d+)\.(partial|replaced)-[a-z0-9_]+"
)


@dataclass(frozen=True)
class RunFolder:
    """A run's `output_dir`."""

    path: Path

    @property
    def results(self) -> Path:
        return self.path / RESULTS

    @property
    def metrics(self) -> Path:
        return self.path / METRICS

    @property
    def samples(self) -> Path:
        return self.path / SAMPLES

    @property
    def spikes(self) -> Path:
        return self.path / SPIKES

    @property
    def is_run(self) -> bool:
        """Whether phinetune wrote this folder. Then its config.yaml begins with `MARK`."""
        try:
            return (self.path / CONFIG).read_text(encoding="utf-8").startswith(MARK)
        except (OSError, UnicodeDecodeError):
            return False

    @property
    def is_finished(self) -> bool:
        return self.is_run and self.results.is_file()

    @property
    def has_adapter(self) -> bool:
        """Whether training came to its end and left its adapter."""
        return (self.path / ADAPTER).is_file()

    def checkpoints(self) -> list[Path]:
        """The checkpoints that have all files to go on from, oldest first."""
        return [folder for folder in self._numbered() if not _lacking(folder)]

    def _numbered(self) -> list[Path]:
        """The folders of all checkpoints, complete or not, oldest first."""
        folders = [p for p in self.path.glob("checkpoint-*") if p.name.removeprefix("checkpoint-").isdigit()]
        return sorted(folders, key=_step)

    def check_free(self, overwrite: bool) -> None:
        """Make sure that a new run may be written here. Nothing is changed.

        Raises:
            RunError: the folder holds a finished run or checkpoints (unless `overwrite` is true), or files that no run
                wrote; or it is a file.
        """
        if self.path.exists() and not self.path.is_dir():
            raise RunError(f"output_dir {self.path} is a file; name a folder")
        if not self.path.is_dir() or all(map(_is_hidden, self.path.iterdir())):
            return
        if not self.is_run:
            raise RunError(
                f"output_dir {self.path} holds files that no run of phinetune wrote; name an empty or new folder"
            )
        if overwrite or not (self.is_finished or self._numbered() or self.has_adapter):
            return
        if self.is_finished or not self.checkpoints():
            unusable = "checkpoints that a run can't go on from" if self._numbered() else "a trained adapter"
            state = "a finished run" if self.is_finished else unusable
            raise RunError(
                f"output_dir {self.path} holds {state}; name another folder with "
                "`--set training_config.output_dir=…`, or replace the run with --overwrite"
            )
        raise RunError(
            f"output_dir {self.path} holds a run that has not ended; go on with --resume, or replace the run with "
            "--overwrite"
        )

    def checkpoint_to_resume(self, wanted: Path | None = None) -> Path | None:
        """The newest whole checkpoint. None: the run stopped before its first one, and begins again.

        Of newer ones that are damaged, a line in the log says what is wrong with them.

        Args:
            wanted: the checkpoint to go on from, if the user named one.

        Raises:
            RunError: the folder holds no run, no checkpoint that a run can go on from, or a newer one than `wanted`.
        """
        if not self.is_run:
            asked = f"training_config.resume_from_checkpoint: {wanted}: " if wanted else ""
            out = "the key" if wanted else "--resume or training_config.resume_from_checkpoint"
            raise RunError(f"{asked}output_dir {self.path} holds no run to go on with; leave {out} out to start one")
        newest, damaged = self._newest_whole()
        if newest is None:
            self._check_nothing_is_lost(damaged)
        if wanted is not None:
            self._check_wanted(wanted, newest, damaged)
        if newest:
            self._tell(newest, damaged)
        return newest

    def _tell(self, newest: Path, damaged: Mapping[str, Sequence[str]]) -> None:
        """Say in the log what is wrong with the files of a run that goes on from a checkpoint."""
        for name, faults in damaged.items():
            logger.warning("%s is not used, since %s; going on from %s", name, _joined(faults), newest.name)
        if not has_manifest(newest):
            logger.warning(
                "%s is of an older version and has no %s: its files can be read, but were not compared with hashes",
                *(newest.name, MANIFEST),
            )
        faults = damage(self.path) if self.has_adapter and has_manifest(self.path) else []
        if faults:
            logger.warning("%s: %s; written again at the end of the run", self.path, _joined(faults))

    def _newest_whole(self) -> tuple[Path | None, dict[str, list[str]]]:
        """The newest whole checkpoint, and what is wrong with the newer ones, by their names."""
        damaged: dict[str, list[str]] = {}
        for folder in reversed(self._numbered()):
            faults = _faults(folder)
            if not faults:
                return folder, damaged
            damaged[folder.name] = faults
        return None, damaged

    def _check_nothing_is_lost(self, damaged: Mapping[str, Sequence[str]]) -> None:
        """Of a run without a checkpoint to go on from: make sure that it may begin again.

        Args:
            damaged: what is wrong with each of its checkpoints.
        """
        what_to_do = "start a new run in another folder, or replace this one with --overwrite"
        if damaged:
            told = [f"output_dir {self.path}: {name} can't be gone on from, since {_joined(faults)}"
                    for name, faults in damaged.items()]  # fmt: skip
            raise RunError([*told, f"nothing was changed; {what_to_do}"])
        if self.is_finished:
            raise RunError(
                f"output_dir {self.path} holds a finished run without checkpoints, so there is nothing to go on from; "
                + what_to_do
            )
        if self.has_adapter:
            raise RunError(
                f"output_dir {self.path} holds a trained adapter without checkpoints: the run was stopped after its "
                f"last step, so there is nothing to go on from; compare it with `phinetune evaluate {self.path}`, "
                + what_to_do
            )

    def _check_wanted(self, wanted: Path, newest: Path | None, damaged: Mapping[str, Sequence[str]]) -> None:
        place = wanted.expanduser().resolve()
        if newest and place in (newest.resolve(), self.path.resolve()):
            return
        if place.name in damaged and place.parent == self.path.resolve():
            raise RunError(f"{wanted} can't be gone on from, since {_joined(damaged[place.name])}")
        if newest and place in [folder.resolve() for folder in self.checkpoints()]:
            raise RunError(
                f"{wanted}: {newest.name} is newer, and its steps would be done again; move the newer checkpoints "
                "away first"
            )
        raise RunError(
            f"training_config.resume_from_checkpoint: {wanted}: no checkpoint that the run in {self.path} can go on "
            "from; set training_config.output_dir to the folder of the checkpoint's run"
        )

    def check_not_stopped_early(self) -> None:
        """Make sure that the run has not come to its end before its last step. Then there is nothing to go on with.

        Raises:
            RunError: it has.
        """
        training = self._read(RESULTS).get("training") or {}
        if self.is_finished and training.get("stopped_early"):
            raise RunError(
                f"output_dir {self.path}: the run has stopped early at step {training.get('steps')}, as "
                "evaluation.early_stopping_patience or a callback asked, and is finished; to train on all the same, "
                "set another patience, or leave the callback out, and give --resume --changed"
            )

    def tidy(self) -> None:
        """Finish what a process that was killed has left half done. The folder must be locked.

        A run that was being replaced comes back if the one that was to replace it has nothing to go on from. What was
        never published is deleted.
        """
        if not self.path.is_dir():
            return
        if settle(self.path, self._own(), CONFIG, self._has_work()):
            logger.warning(
                "%s: the run that was to replace the one there stopped before its first checkpoint; the earlier run "
                "is back",
                self.path,
            )
        for place in self.path.iterdir():
            if LEFTOVER.fullmatch(place.name):
                remove(place)

    def read_config(self) -> RunConfig:
        """The configuration that the run was started with."""
        return load_config(self.path / CONFIG)

    def start(self, config: RunConfig, revision: str | None) -> None:
        """Write config.yaml, and with it begin a run. The files of an earlier one are set aside first.

        They are kept until `replace` is called.

        Args:
            revision: the commit of the model if it comes from the hub; config.yaml then names it.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        if self.is_run:
            self.tidy()
            set_aside(self.path, self._own(), self.path / CONFIG)
        self.write_config(config, revision)

    def replace(self) -> None:
        """Delete the run that was here before, if this one has something to go on from by now."""
        if self._has_work():
            drop(self.path)

    def write_config(self, config: RunConfig, revision: str | None) -> None:
        """Write config.yaml. See `start`."""
        resolved = with_absolute_places(config)
        resolved.model.revision = revision
        resolved.training_config["output_dir"] = str(self.path)
        resolved.training_config.pop("resume_from_checkpoint", None)  # a wish for one call, and not of the run
        why = "".join(f"# {line}\n" for line in self.read_tuned().get("why") or [])
        write_text(self.path / CONFIG, MARK + why + dump_config(resolved))

    def recorded_data(self) -> dict[str, Any]:
        """What became of the run's rows, as `Chats.facts` returned it; empty if training never began."""
        for name in (RESULTS, START):
            data = self._read(name).get("data")
            if isinstance(data, dict) and data:
                return data
        return {}

    def read_start(self) -> dict[str, Any]:
        """What start.json holds; empty if there is none that can be read."""
        return self._read(START)

    def _read(self, name: str) -> dict[str, Any]:
        try:
            tree = json.loads((self.path / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return tree if isinstance(tree, dict) else {}

    def read_tuned(self) -> dict[str, Any]:
        """What tune.json holds; empty if the run is no winner of a tune or a race."""
        return self._read(TUNED)

    def write_tuned(self, tree: Mapping[str, Any]) -> None:
        """Write tune.json: the candidates, their losses, and a line for each setting that they decided."""
        self._write(TUNED, tree)

    def write_start(self, facts: Mapping[str, Any]) -> None:
        """Write start.json: what is known when training begins (base, data, steps, machine, versions, process, and
        what decides the result).
        """
        self._write(START, tree_without_secrets(facts))

    def write_results(self, results: Mapping[str, Any]) -> None:
        self._write(RESULTS, results)

    def write_evaluation(self, evaluation: Mapping[str, Any]) -> None:
        """Write a comparison that was made after the run. It replaces an earlier one."""
        self._write(EVALUATION, evaluation)

    def _write(self, name: str, tree: Mapping[str, Any]) -> None:
        write_text(self.path / name, json.dumps(tree, indent=2, ensure_ascii=False) + "\n", private=True)

    def _has_work(self) -> bool:
        """Whether there is a checkpoint to go on from, or an adapter."""
        return self.has_adapter or bool(self.checkpoints())

    def _own(self) -> list[Path]:
        """All that the run has written, but for config.yaml."""
        named = [self.path / name for name in OWN_FILES if name != CONFIG]
        return [place for place in named if os.path.lexists(place)] + self._numbered()


def told_changes(changed: Sequence[Mapping[str, Any]] | None) -> list[str]:
    """A sentence for each time that the run was resumed with something changed.

    Args:
        changed: as start.json and the section `training` of results.json hold it.
    """
    return [f"Resumed with something changed at step {one['step']}: {', '.join(one['what'])}." for one in changed or []]


def _lacking(checkpoint: Path) -> list[str]:
    """The files that a checkpoint lacks to be gone on from."""
    elsewhere = [OPTIMIZER] if (checkpoint / DEEPSPEED).is_file() else []
    lacking = [name for name in RESUMABLE if name not in elsewhere and not (checkpoint / name).is_file()]
    return lacking if any(checkpoint.glob(RANDOM)) else [*lacking, RANDOM.replace("*", "")]


def _faults(checkpoint: Path) -> list[str]:
    """Why a run can't go on from a checkpoint; empty if it can."""
    try:
        faults = damage(checkpoint) if checkpoint.is_dir() else []
    except OSError as error:
        return [f"it can't be read: {reason_of(error)}"]
    lacking = [name for name in _lacking(checkpoint) if not any(fault.startswith(f"{name} ") for fault in faults)]
    if lacking:
        cause = "" if faults else " (training_config.save_only_model: true saves none of them)"
        faults.append(f"it lacks {', '.join(lacking)}{cause}")
    return faults


def _joined(faults: Sequence[str]) -> str:
    return ", ".join(at_most(faults, 4))


def _is_hidden(place: Path) -> bool:
    """Whether something in a folder is the lock, a run that was set aside, or what a killed process left."""
    return place.name in (LOCK, *FOLDERS) or bool(LEFTOVER.fullmatch(place.name))


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def first_start(places: Iterable[Path]) -> dict[str, Any]:
    """What the first of some runs that has begun recorded then; empty if none has."""
    starts = (RunFolder(place).read_start() for place in places)
    return next((start for start in starts if start.get("decides")), {})
