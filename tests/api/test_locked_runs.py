"""Two runs in one folder: whoever comes second is refused and told who is there, and nothing is touched."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from rich.console import Console

from helpers import tiny_config
from phinetune import evaluate
from phinetune.api.train import train_config
from phinetune.config.run import RunConfig, dump_config
from phinetune.errors import RunError
from phinetune.exporting.merge.merge import merge_run
from phinetune.liveness import this_process
from phinetune.run_lock import LOCK

QUIET = Console(quiet=True)


@pytest.fixture
def taken(tiny_run: Path, tmp_path: Path) -> Path:
    """A run into which another process writes: the parent of this one."""
    folder = Path(shutil.copytree(tiny_run, tmp_path / "run"))
    parent = {**this_process(), "pid": os.getppid(), "began": psutil.Process(os.getppid()).create_time()}
    (folder / LOCK).write_text(json.dumps(parent))
    return folder


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(file): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


CALLS: dict[str, Callable[[Path, Path], Any]] = {
    "train": lambda chats, run: train_config(tiny_config(chats, run), QUIET),
    "resume": lambda chats, run: train_config(tiny_config(chats, run), QUIET, resume=True),
    "changed": lambda chats, run: train_config(tiny_config(chats, run), QUIET, resume=True, changed=True),
    "overwrite": lambda chats, run: train_config(tiny_config(chats, run), QUIET, overwrite=True),
    "evaluate": lambda chats, run: evaluate(run, console=QUIET),
}


@pytest.mark.parametrize("call", CALLS)
def test_whoever_would_write_into_a_running_run_is_refused(chats: Path, taken: Path, call: str) -> None:
    before = snapshot(taken)
    with pytest.raises(RunError, match=f"process {os.getppid()} on .* is writing a run there"):
        CALLS[call](chats, taken)
    assert snapshot(taken) == before


def test_whoever_only_reads_a_running_run_may(taken: Path, tmp_path: Path) -> None:
    assert evaluate(taken, record=False, console=QUIET).results
    merge_run(taken / "checkpoint-2", tmp_path / "merged")


def test_nothing_is_merged_into_the_folder_of_a_run_that_begins(tiny_run: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / LOCK).write_text(json.dumps(this_process()))
    with pytest.raises(Exception, match="run"):
        merge_run(tiny_run, tmp_path / "run")


def test_a_run_that_ends_frees_its_folder(chats: Path, tmp_path: Path) -> None:
    config = tiny_config(chats, tmp_path / "run", max_steps=1)
    config.evaluation.enabled = False
    train_config(config, QUIET)
    assert not (tmp_path / "run" / LOCK).exists()


@pytest.mark.parametrize("place", ["new/run", "run"])
def test_a_run_that_is_refused_leaves_no_folder(chats: Path, tmp_path: Path, place: str) -> None:
    config = tiny_config(chats, tmp_path / place)
    config.data.train = str(tmp_path / "none.jsonl")
    with pytest.raises(Exception, match="no such file"):
        train_config(config, QUIET)
    assert not (tmp_path / place.split("/")[0]).exists()


def test_an_evaluation_that_can_not_be_kept_is_still_given(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A run began in the folder while its adapter was evaluated."""
    folder = Path(shutil.copytree(tiny_run, tmp_path / "run"))
    parent = {**this_process(), "pid": os.getppid(), "began": psutil.Process(os.getppid()).create_time()}
    monkeypatch.setattr(
        "phinetune.api.evaluate.show_comparison", lambda *_: (folder / LOCK).write_text(json.dumps(parent))
    )
    assert evaluate(folder, console=QUIET).results
    assert "the evaluation was not kept there" in caplog.text
    assert not (folder / "evaluation.json").exists()


@pytest.fixture
def running(chats: Path, tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], RunConfig]]:
    """A real process that trains, past its second checkpoint."""
    run, file = tmp_path / "run", tmp_path / "run.yaml"
    config = tiny_config(
        chats, run, max_steps=4000, save_strategy="steps", save_steps=1, save_total_limit=2, eval_strategy="no"
    )
    file.write_text(dump_config(config))
    command = [sys.executable, "-m", "phinetune", "train", str(file)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 120
        while len(list(run.glob("checkpoint-*"))) < 2 and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        try:
            yield process, config
        finally:
            process.kill()
            process.communicate()


def test_a_real_run_is_left_alone_and_after_its_kill_taken_over(
    running: tuple[subprocess.Popen[str], RunConfig], caplog: pytest.LogCaptureFixture
) -> None:
    process, config = running
    for options in ({"resume": True}, {"overwrite": True}):
        with pytest.raises(RunError, match=f"process {process.pid} on"):
            train_config(config, QUIET, **options)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    run = config.output_dir
    newest = max(int(place.name.partition("-")[2]) for place in run.glob("checkpoint-*"))
    config.training_config["max_steps"] = newest + 1
    train_config(config, QUIET, resume=True, changed=True)
    assert f"the lock of process {process.pid}" in caplog.text
    assert not [place for place in run.iterdir() if place.name.startswith(".")]
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, newest + 2))
