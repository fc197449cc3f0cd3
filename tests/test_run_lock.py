"""One process writes into a run's folder at a time; locks that were left behind are taken over."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from phinetune.errors import RunError
from phinetune.liveness import this_process
from phinetune.run_lock import LOCK, locked, refuse_if_locked

HOLD = """
import sys, time
from pathlib import Path
from phinetune.run_lock import locked
with locked(Path(sys.argv[1])):
    print("locked", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def parent() -> dict[str, Any]:
    """Another process that is alive."""
    return {**this_process(), "pid": os.getppid(), "began": psutil.Process(os.getppid()).create_time()}


def write_lock(folder: Path, process: dict[str, Any]) -> None:
    folder.mkdir(exist_ok=True)
    (folder / LOCK).write_text(json.dumps(process))


@pytest.mark.parametrize("depth", ["run", "runs/mine", "a/b/c"])
def test_a_folder_that_was_made_for_its_lock_goes_with_it(tmp_path: Path, depth: str) -> None:
    with locked(tmp_path / depth):
        assert json.loads((tmp_path / depth / LOCK).read_text())["pid"] == os.getpid()
    assert not list(tmp_path.iterdir())


def test_what_was_written_under_the_lock_stays(tmp_path: Path) -> None:
    with locked(tmp_path / "run"):
        (tmp_path / "run" / "config.yaml").write_text("")
    assert [place.name for place in (tmp_path / "run").iterdir()] == ["config.yaml"]


def test_the_lock_goes_when_the_run_fails(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), locked(tmp_path):
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def test_a_running_process_is_named_and_its_lock_left(tmp_path: Path, parent: dict[str, Any]) -> None:
    write_lock(tmp_path / "run", parent)
    with pytest.raises(RunError, match=rf"process {os.getppid()} on .*, begun \d\d\d\d-.* is writing a run there"):
        locked(tmp_path / "run").__enter__()
    with pytest.raises(RunError, match=f"kill {os.getppid()}"):
        refuse_if_locked(tmp_path / "run")
    assert json.loads((tmp_path / "run" / LOCK).read_text()) == parent


def test_the_same_process_does_not_write_there_twice(tmp_path: Path) -> None:
    with locked(tmp_path), pytest.raises(RunError, match=f"process {os.getpid()} on"):
        locked(tmp_path).__enter__()


def test_of_another_host_nothing_can_be_known(tmp_path: Path) -> None:
    write_lock(tmp_path / "run", {"host": "elsewhere", "pid": 1, "began": 1.7e9})
    with pytest.raises(RunError, match=r"process 1 on elsewhere, begun .* if it has ended, delete .*run/\.lock"):
        locked(tmp_path / "run").__enter__()


@pytest.mark.parametrize("process", ["killed", "zombie", "id used again", "no time", "odd id"])
def test_a_lock_that_was_left_behind_is_taken_over_in_a_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, process: str, parent: dict[str, Any]
) -> None:
    found = {**parent, "began": parent["began"] - 100}
    if process in ("killed", "zombie"):
        with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
            found = {**parent, "pid": child.pid, "began": psutil.Process(child.pid).create_time()}
            write_lock(tmp_path / "run", found)
            with pytest.raises(RunError, match="is writing"):
                refuse_if_locked(tmp_path / "run")
            child.send_signal(signal.SIGKILL)
            deadline = time.monotonic() + 20
            while psutil.Process(child.pid).status() != psutil.STATUS_ZOMBIE and time.monotonic() < deadline:
                time.sleep(0.01)
            if process == "zombie":  # its parent has not taken notice of its end
                refuse_if_locked(tmp_path / "run")
    elif process == "no time":
        found = {"host": parent["host"], "pid": os.getppid()}
    elif process == "odd id":
        found = {**parent, "pid": 10**30}
    write_lock(tmp_path / "run", found)
    with locked(tmp_path / "run"):
        assert json.loads((tmp_path / "run" / LOCK).read_text())["pid"] == os.getpid()
    assert f"the lock of process {found['pid']}" in caplog.text
    assert "which has ended, is taken over" in caplog.text


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "{}", "\udcff"])
def test_a_lock_that_names_nobody_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / LOCK).write_bytes(text.encode(errors="surrogateescape"))
    refuse_if_locked(tmp_path)
    with locked(tmp_path):
        pass


def test_a_killed_process_leaves_a_lock_that_the_next_one_takes(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout
        assert child.stdout.readline() == "locked\n"
        with pytest.raises(RunError, match=f"process {child.pid} on"):
            locked(tmp_path / "run").__enter__()
        child.send_signal(signal.SIGKILL)
    assert (tmp_path / "run" / LOCK).exists()
    with locked(tmp_path / "run"):
        pass
    assert not (tmp_path / "run" / LOCK).exists()


def test_a_forked_process_does_not_give_the_lock_away(tmp_path: Path) -> None:
    with locked(tmp_path / "run"):
        lock = locked(tmp_path / "other")
        lock.__enter__()
        child = os.fork()
        if child == 0:
            try:
                lock.__exit__(None, None, None)
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        assert (tmp_path / "other" / LOCK).exists()
        lock.__exit__(None, None, None)
        assert not (tmp_path / "other").exists()


PROCESSES = 6


def _race(folder: Path, tried: Path) -> int:
    """Exit status of a process that wants the lock: 3 if it is refused. Who gets it keeps it until all have tried."""
    deadline = time.monotonic() + 60
    try:
        with locked(folder):
            while len(list(tried.iterdir())) < PROCESSES - 1 and time.monotonic() < deadline:
                time.sleep(0.01)
        return 0
    except RunError:
        (tried / str(os.getpid())).touch()
        return 3


@pytest.mark.parametrize("left", [False, True])
def test_of_many_processes_at_once_one_gets_the_lock(tmp_path: Path, left: bool) -> None:
    folder, tried = tmp_path / "run", tmp_path / "tried"
    tried.mkdir()
    if left:
        write_lock(folder, {**this_process(), "began": 0})
    children = []
    for _ in range(PROCESSES):
        child = os.fork()
        if child == 0:
            try:
                os._exit(_race(folder, tried))
            finally:
                os._exit(1)
        children.append(child)
    ended = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert sorted(ended) == [0, 3, 3, 3, 3, 3]


@pytest.mark.parametrize("place", ["file", "file/run"])
def test_a_place_that_can_not_be_written_to_is_a_sentence(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="can't be written to"):
        locked(tmp_path / place).__enter__()
    refuse_if_locked(tmp_path / place)
