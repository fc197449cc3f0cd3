"""The folder of a run: which files it holds, whether a run may be written there, and where a stopped run goes on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phinetune.config.places import with_absolute_places
from phinetune.config.run import RunConfig, dump_config, load_config
from phinetune.errors import RunError
from phinetune.files import write_text

CONFIG = "config.yaml"
METRICS = "metrics.jsonl"
SAMPLES = "samples.jsonl"
LOG = "run.log"
START = "start.json"
RESULTS = "results.json"
EVALUATION = "evaluation.json"
CARD = "README.md"
REPORT = "report.html"
MARK = "# A run of phinetune, its configuration with every value in force.\n"
# The files that a run needs to go on from a checkpoint. A checkpoint gets its name in one rename, when it is complete.
RESUMABLE = ("adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json")
OWN_FILES = (
    CONFIG,
    METRICS,
    SAMPLES,
    LOG,
    START,
    RESULTS,
    EVALUATION,
    CARD,
    REPORT,
    "adapter_config.json",
    "adapter_model.safetensors",
    "base.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
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
    def is_run(self) -> bool:
        """Whether phinetune wrote this folder. Then its config.yaml begins with `MARK`."""
        try:
            return (self.path / CONFIG).read_text(encoding="utf-8").startswith(MARK)
        except (OSError, UnicodeDecodeError):
            return False

    @property
    def is_finished(self) -> bool:
        return self.is_run and self.results.is_file()

    def checkpoints(self) -> list[Path]:
        """The complete checkpoints, oldest first."""
        return [folder for folder in self._numbered() if all((folder / name).is_file() for name in RESUMABLE)]

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
        if not self.path.is_dir() or not any(self.path.iterdir()):
            return
        if not self.is_run:
            raise RunError(
                f"output_dir {self.path} holds files that no run of phinetune wrote; name an empty or new folder"
            )
        if overwrite or not (self.is_finished or self._numbered()):
            return
        if self.is_finished or not self.checkpoints():
            state = "a finished run" if self.is_finished else "checkpoints that a run can't go on from"
            raise RunError(
                f"output_dir {self.path} holds {state}; name another folder with "
                "`--set training_config.output_dir=…`, or replace the run with --overwrite"
            )
        raise RunError(
            f"output_dir {self.path} holds a run that has not ended; go on with --resume, or replace the run with "
            "--overwrite"
        )

    def checkpoint_to_resume(self, wanted: Path | None = None) -> Path | None:
        """The newest complete checkpoint. None: the run stopped before its first one, and begins again.

        Args:
            wanted: the checkpoint to go on from, if the user named one.

        Raises:
            RunError: the folder holds no run, no checkpoint that a run can go on from, or a newer one than `wanted`.
        """
        if not self.is_run:
            asked = f"training_config.resume_from_checkpoint: {wanted}: " if wanted else ""
            out = "the key" if wanted else "--resume or training_config.resume_from_checkpoint"
            raise RunError(f"{asked}output_dir {self.path} holds no run to go on with; leave {out} out to start one")
        newest = max(self.checkpoints(), key=_step, default=None)
        if newest is None:
            self._check_nothing_is_lost()
        if wanted is not None:
            self._check_wanted(wanted, newest)
        return newest

    def _check_nothing_is_lost(self) -> None:
        """Of a run without a checkpoint to go on from: make sure that it may begin again."""
        kept = self._numbered()
        if kept:
            lacking = ", ".join(name for name in RESUMABLE if not (kept[-1] / name).is_file())
            raise RunError(
                f"output_dir {self.path}: {kept[-1].name} can't be gone on from, since it lacks {lacking} "
                "(training_config.save_only_model: true saves none of them); start a new run in another folder, or "
                "replace this one with --overwrite"
            )
        if self.is_finished:
            raise RunError(
                f"output_dir {self.path} holds a finished run without checkpoints, so there is nothing to go on from; "
                "start a new run in another folder, or replace this one with --overwrite"
            )

    def _check_wanted(self, wanted: Path, newest: Path | None) -> None:
        if newest and wanted.expanduser().resolve() in (newest.resolve(), self.path.resolve()):
            return
        if newest and wanted.expanduser().resolve() in [folder.resolve() for folder in self.checkpoints()]:
            raise RunError(
                f"{wanted}: {newest.name} is newer, and its steps would be done again; move the newer checkpoints "
                "away first"
            )
        raise RunError(
            f"training_config.resume_from_checkpoint: {wanted}: no checkpoint that the run in {self.path} can go on "
            "from; set training_config.output_dir to the folder of the checkpoint's run"
        )

    def read_config(self) -> RunConfig:
        """The configuration that the run was started with."""
        return load_config(self.path / CONFIG)

    def start(self, config: RunConfig, revision: str | None) -> None:
        """Delete the files of an earlier run in this folder, and write config.yaml.

        Args:
            revision: the commit of the model if it comes from the hub; config.yaml then names it.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        if self.is_run:
            self._clear()
        self.write_config(config, revision)

    def write_config(self, config: RunConfig, revision: str | None) -> None:
        """Write config.yaml. See `start`."""
        resolved = with_absolute_places(config)
        resolved.model.revision = revision
        resolved.training_config["output_dir"] = str(self.path)
        resolved.training_config.pop("resume_from_checkpoint", None)  # a wish for one call, and not of the run
        write_text(self.path / CONFIG, MARK + dump_config(resolved))

    def recorded_data(self) -> dict[str, Any]:
        """What became of the run's rows, as `Chats.facts` returned it; empty if training never began."""
        for name in (RESULTS, START):
            try:
                data: dict[str, Any] = json.loads((self.path / name).read_text(encoding="utf-8")).get("data") or {}
            except (OSError, ValueError, AttributeError):
                continue
            return data
        return {}

    def read_start(self) -> dict[str, Any]:
        """What start.json holds; empty if there is none that can be read."""
        try:
            tree = json.loads((self.path / START).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return tree if isinstance(tree, dict) else {}

    def write_start(self, facts: Mapping[str, Any]) -> None:
        """Write start.json: what is known when training begins (base, data, steps, machine, versions, process, and
        what decides the result).
        """
        self._write(START, facts)

    def write_results(self, results: Mapping[str, Any]) -> None:
        self._write(RESULTS, results)

    def write_evaluation(self, evaluation: Mapping[str, Any]) -> None:
        """Write a comparison that was made after the run. It replaces an earlier one."""
        self._write(EVALUATION, evaluation)

    def _write(self, name: str, tree: Mapping[str, Any]) -> None:
        write_text(self.path / name, json.dumps(tree, indent=2, ensure_ascii=False) + "\n")

    def _clear(self) -> None:
        for name in OWN_FILES:
            (self.path / name).unlink(missing_ok=True)
        for folder in [*self._numbered(), *self.path.glob(".*.partial-*")]:
            shutil.rmtree(folder)


def told_changes(changed: Sequence[Mapping[str, Any]] | None) -> list[str]:
    """A sentence for each time that the run was resumed with something changed.

    Args:
        changed: as start.json and the section `training` of results.json hold it.
    """
    return [f"Resumed with something changed at step {one['step']}: {', '.join(one['what'])}." for one in changed or []]


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))
