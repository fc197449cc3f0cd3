"""A part of the sweep of `make soak`: a dozen faults in a short run, and half a dozen allocations that fail."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from soak.disk_state import Disk, Operation
from soak.journal import Journal

SWEEP = Path(__file__).parent / "sweep.py"


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
@pytest.mark.slow
def test_a_disturbed_run_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    command = [sys.executable, str(SWEEP), "--most", "12", "--seed", "0", "--journal", str(tmp_path / "journal")]
    environment = {key: value for key, value in os.environ.items() if key != "PHINETUNE_FAULTS"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert "12 cases" in done.stdout
    assert len((tmp_path / "journal").read_text().splitlines()) == 12


def test_a_journal_counts_for_the_same_form_and_tree_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "journal"
    Journal(file, "plain", 300).add("KILL at operation 7", problems=[], refused=False, state="s", ended_by=[])
    with file.open("a") as lines:
        lines.write('{"key": "cut o')
    assert list(Journal(file, "plain", 300).done) == ["KILL at operation 7"]
    assert not Journal(file, "packed", 300).done
    assert not Journal(file, "plain", 301).done
    monkeypatch.setattr("soak.journal.SOURCE", tmp_path)
    assert not Journal(file, "plain", 300).done


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
@pytest.mark.slow
def test_where_memory_runs_out_a_run_stops_in_a_sentence_and_goes_on_to_the_same_bits() -> None:
    command = [sys.executable, str(SWEEP), "--faults", "MEMORY", "--most", "6", "--seed", "1"]
    environment = {key: value for key, value in os.environ.items() if key != "PHINETUNE_FAULTS"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert "6 cases" in done.stdout


def operations(*given: tuple[str, str, str, int, bytes]) -> list[Operation]:
    return [Operation(kind, i, f"/r/{a}", f"/r/{b}" if b else "", at, data) for i, (kind, a, b, at, data) in
            enumerate(given, 1)]  # fmt: skip


def left(disk: Disk, names: str) -> dict[str, bytes]:
    """What a crash leaves, by name."""
    kept = disk.names if names == "all" else disk.kept_names
    return {name.removeprefix("/r/"): file.flushed for name, file in kept.items()}


def test_what_was_not_flushed_is_lost() -> None:
    disk = Disk("/r", folders={"/r"})
    for one in operations(
        ("t", "a", "", 0, b""), ("w", "a", "", 0, b"hello"), ("s", "a", "", 0, b""), ("w", "a", "", 5, b" world"),
        ("t", "b", "", 0, b""), ("w", "b", "", 0, b"lost"),
    ):  # fmt: skip
        disk.apply(one)
    assert left(disk, "all") == {"a": b"hello", "b": b""}
    assert left(disk, "flushed") == {}  # nobody flushed the folder


def test_a_flushed_folder_keeps_its_names() -> None:
    disk = Disk("/r", folders={"/r"})
    for one in operations(
        ("t", "x", "", 0, b""), ("w", "x", "", 0, b"new"), ("s", "x", "", 0, b""), ("r", "x", "a", 0, b""),
    ):  # fmt: skip
        disk.apply(one)
    assert left(disk, "flushed") == {}
    disk.apply(Operation("s", 9, "/r", "", 0, b""))
    assert left(disk, "flushed") == {"a": b"new"}
    disk.apply(Operation("u", 10, "/r/a", "", 0, b""))
    assert left(disk, "all") == {}
    assert left(disk, "flushed") == {"a": b"new"}  # the removal was not flushed
