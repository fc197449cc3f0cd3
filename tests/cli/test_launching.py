"""`phinetune train --nproc`: one message, one exit status, one save; and a process that is killed ends the run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from helpers import tiny_config, train_only
from phinetune.cli.launching import _environment, _outcome, launches
from phinetune.cli.program import program
from phinetune.config.run import dump_config
from phinetune.errors import MACHINE_FAULT, RunError
from phinetune.files import is_machine_fault
from phinetune.launched import LAUNCHER, REPORTS, Report

STOPPED = 75
STARTED: list[subprocess.Popen[str]] = []


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing of a launcher around, and nothing left behind: a run of a test that failed would train on for hours."""
    for name in ("RANK", "WORLD_SIZE", REPORTS, LAUNCHER):
        monkeypatch.delenv(name, raising=False)
    yield
    while STARTED:
        process = STARTED.pop()
        if process.poll() is None:
            for child in psutil.Process(process.pid).children(recursive=True):
                child.kill()
            process.kill()
            process.wait()


def test_only_a_run_of_several_processes_is_launched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert not launches(1)
    assert launches(2)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RunError, match="leave --nproc out"):
        launches(2)
    monkeypatch.setenv(REPORTS, str(tmp_path))
    assert not launches(2)


@dataclass(frozen=True)
class Failure:
    """What torch's agent knows of a process that failed."""

    exitcode: int
    timestamp: int = 5


def outcome(reports: dict[int, Report], failed: dict[int, Failure], tmp_path: Path, *signals: int) -> Any:
    return _outcome(reports, dict(failed), 4, signals, tmp_path)


def test_the_exit_status_is_the_first_process_s(tmp_path: Path) -> None:
    assert outcome({}, {}, tmp_path) == 0
    assert outcome({0: Report(0, STOPPED)}, {}, tmp_path) == STOPPED
    assert outcome({}, {2: Failure(-15)}, tmp_path, signal.SIGTERM) == 128 + signal.SIGTERM


def test_a_message_is_told_once_and_not_that_others_were_lost(tmp_path: Path) -> None:
    reports = {0: Report(0, 2, ("gone",), lost=True), 2: Report(2, 2, ("x: no such file",))}
    failed = {2: Failure(2, 5), 0: Failure(2, 5), 1: Failure(-15, 5)}
    with pytest.raises(RunError) as caught:
        outcome(reports, failed, tmp_path)
    assert caught.value.problems == ["x: no such file"]
    assert not is_machine_fault(caught.value)


def test_a_fault_of_the_machine_stays_one(tmp_path: Path) -> None:
    reports = {0: Report(0, 2, ("gone",), lost=True), 1: Report(1, MACHINE_FAULT, ("no space is left",))}
    with pytest.raises(RunError) as caught:
        outcome(reports, {1: Failure(MACHINE_FAULT), 0: Failure(2)}, tmp_path)
    assert caught.value.problems == ["no space is left"]
    assert is_machine_fault(caught.value)


def test_a_process_that_could_say_nothing_is_named(tmp_path: Path) -> None:
    reports = {0: Report(0, 2, ("gone",), lost=True)}
    log = tmp_path / "run" / "attempt_0" / "1" / "stderr.log"
    log.parent.mkdir(parents=True)
    log.write_text("first\n\nlast words\n")
    with pytest.raises(RunError) as caught:
        outcome(reports, {0: Failure(2, 5), 1: Failure(-9, 5), 3: Failure(-15, 6)}, tmp_path)
    assert caught.value.problems[0].startswith(
        "process 2 of 4 was ended by SIGKILL, which is also what the system does"
    )
    assert caught.value.problems[1:] == ["  first", "  last words"]
    with pytest.raises(RunError, match="process 4 of 4 ended without a word"):
        outcome(reports, {3: Failure(1, 5), 0: Failure(2, 6)}, tmp_path)


def test_an_error_that_nobody_foresaw_is_shown_with_its_place(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reports = {0: Report(0, 2, ("gone",), lost=True), 1: Report(1, 1, (), "Traceback: here\n")}
    assert outcome(reports, {0: Failure(2), 1: Failure(1)}, tmp_path) == 1
    assert capsys.readouterr().err == "Traceback: here\n"


def test_processes_name_the_program_that_the_user_called(monkeypatch: pytest.MonkeyPatch) -> None:
    called = "/elsewhere/bin/phinetune"
    monkeypatch.setattr(sys, "argv", [called])
    monkeypatch.setenv("PATH", "")
    with _environment("reports", 2):
        monkeypatch.setenv("RANK", "0")
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setattr(sys, "argv", ["/src/phinetune/__main__.py"])
        assert program() == called


def start(config: Path, *more: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-m", "phinetune", "train", str(config), "--nproc", "2", *more],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    STARTED.append(process)
    return process


def wait_for(what: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 300
    while not what():
        if process.poll() is not None or time.monotonic() > deadline:
            pytest.fail(f"{process.communicate()}")
        time.sleep(0.05)


@pytest.fixture
def long_run(chats: Path, tmp_path: Path) -> tuple[Path, Path]:
    """The configuration of a run of more steps than a test waits for, and the run's folder."""
    config = tiny_config(
        chats, tmp_path / "run", max_steps=100_000, save_strategy="steps", save_steps=10, save_total_limit=2
    )
    config.model.device = "cpu"
    file = tmp_path / "run.yaml"
    file.write_text(dump_config(config))
    return file, tmp_path / "run"


def newest(folder: Path) -> int:
    return max((int(one.name.split("-")[1]) for one in folder.glob("checkpoint-*")), default=0)


@pytest.mark.slow
def test_a_killed_process_ends_the_run_and_a_stopped_run_is_saved_once(
    long_run: tuple[Path, Path], chats: Path
) -> None:
    """A process is killed; the run goes on from its checkpoint by as many processes, and is stopped by Ctrl-C."""
    file, folder = long_run
    process = start(file)
    wait_for(lambda: newest(folder) > 0, process)
    children = psutil.Process(process.pid).children()
    (second,) = [child for child in children if child.environ().get("RANK") == "1"]
    second.kill()
    out, err = process.communicate(timeout=120)
    assert process.returncode == 2, err
    lines = [line for line in err.splitlines() if "error" in line.lower()]
    assert len(lines) == 1, err
    assert lines[0].startswith("error: process 2 of 2 was ended by SIGKILL")
    assert "Traceback" not in err
    assert not any(child.is_running() for child in children)

    at = newest(folder)
    process = start(file, "--resume")
    wait_for(lambda: newest(folder) > at, process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == STOPPED, err
    assert out.count("Stopped after step") == 1
    assert out.rstrip().endswith(f"train {file} --nproc 2 --resume")
    steps = newest(folder)
    assert f"Stopped after step {steps};" in out
    assert "error" not in err.lower()
    state = json.loads((folder / f"checkpoint-{steps}" / "trainer_state.json").read_text())
    assert state["global_step"] == steps

    config = tiny_config(chats, folder, max_steps=100_000, save_strategy="steps", save_steps=10, save_total_limit=2)
    config.training_config |= {"max_steps": steps + 1, "per_device_train_batch_size": 4}
    config.model.device = "cpu"
    train_only(config, resume=True, changed=True)  # one process goes on from what two left


def test_a_mistake_is_told_once(chats: Path, tmp_path: Path) -> None:
    config = tiny_config(chats, tmp_path / "run")
    config.data.train = str(tmp_path / "nothing.jsonl")
    file = tmp_path / "run.yaml"
    file.write_text(dump_config(config))
    process = start(file)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 2
    assert err.startswith("error: ")
    assert err.count("nothing.jsonl") == 1
    assert len(err.splitlines()) == 1, err
    assert not out
