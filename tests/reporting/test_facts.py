"""A run folder is read in whatever state it is."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import psutil
import pytest

from phinetune.errors import RunError
from phinetune.liveness import this_process
from phinetune.reporting.facts import read_run, read_runs
from phinetune.run_folder import RESULTS, RunFolder
from reporting.report_helpers import make_run


def test_a_finished_run_is_read_whole(tiny_run: Path) -> None:
    run = read_run(tiny_run)
    assert (run.state, run.steps, run.notes) == ("finished", (6, 6), [])
    assert run.base["path"].startswith("random:")
    assert {"base", "tuned"} == run.comparison.keys()
    assert run.start["environment"]["device"] == "cpu"
    assert all(entry["memory"] > 1e6 for entry in run.entries if "loss" in entry)


def test_a_run_that_was_stopped_has_its_data_and_its_steps(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path / "run", steps=12, finished=False))
    assert (run.state, run.steps) == ("stopped", (12, 30))
    assert run.data["train"]["kept"] == 80
    assert run.comparison == {}


PARENT = {**this_process(), "pid": os.getppid(), "began": psutil.Process(os.getppid()).create_time()}


@pytest.mark.parametrize(
    ("process", "state"),
    [
        pytest.param(PARENT, "running", id="another process that is alive"),
        pytest.param({**PARENT, "began": PARENT["began"] - 100}, "stopped", id="a number that is used again"),
        pytest.param({**PARENT, "host": "elsewhere"}, "stopped", id="a process of another machine"),
        pytest.param(this_process(), "stopped", id="this process, which writes its report at the end"),
    ],
)
def test_a_run_is_running_while_its_process_lives(tmp_path: Path, process: dict[str, Any], state: str) -> None:
    folder = RunFolder(make_run(tmp_path / "run", finished=False))
    folder.write_start({"process": process})
    assert read_run(folder.path).state == state


def test_broken_lines_are_left_out_and_told(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", steps=3)
    lines = (folder / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    broken = [b'{"step": 2, "lo\n', b"[1]\n", b'{"loss": 1}\n', b"\xff\xfe\n", b'{"step": "2"}\n', b"null\n", b"{}\n"]
    (folder / "metrics.jsonl").write_bytes(b"".join([lines[0], *broken, *lines[1:]]))
    run = read_run(folder)
    assert [entry["step"] for entry in run.entries] == [1, 2, 3]
    assert run.notes == ["metrics.jsonl: lines 2, 3, 4, 5, 6 and 2 more can't be read and are left out"]


@pytest.mark.parametrize("name", ["start.json", "results.json", "config.yaml", "metrics.jsonl"])
def test_a_lost_or_broken_file_is_told_or_done_without(tmp_path: Path, name: str) -> None:
    folder = make_run(tmp_path / "run")
    mark = (folder / "config.yaml").read_text().splitlines(keepends=True)[0] if name == "config.yaml" else ""
    (folder / name).write_text(mark + "{[")
    assert any(note.startswith(name) for note in read_run(folder).notes)
    if name != "config.yaml":
        (folder / name).unlink()
        assert read_run(folder).notes == []


def test_what_is_no_run_is_refused_all_at_once(tmp_path: Path) -> None:
    with pytest.raises(RunError) as caught:
        read_runs([make_run(tmp_path / "run"), tmp_path / "nowhere", tmp_path])
    assert len(caught.value.problems) == 2
    assert "no such folder" in caught.value.problems[0]


def test_runs_of_one_name_are_told_apart_by_their_paths(tmp_path: Path) -> None:
    paths = [make_run(tmp_path / part / "run") for part in ("a", "b")]
    assert [run.name for run in read_runs(paths)] == [str(path) for path in paths]
    assert read_run(paths[0]).name == "run"


@pytest.mark.parametrize(
    ("steps", "notes"),
    [
        ([], []),
        ([3], ["Steps that changed nothing, since their loss or gradients were not finite: 1 (3)."]),
        (
            list(range(1, 8)),
            ["Steps that changed nothing, since their loss or gradients were not finite: 7 (1, 2, 3, 4, 5 …)."],
        ),
    ],
)
def test_steps_that_were_skipped_are_noted(tmp_path: Path, steps: list[int], notes: list[str]) -> None:
    folder = make_run(tmp_path / "run")
    results = json.loads((folder / RESULTS).read_text())
    (folder / RESULTS).write_text(json.dumps({**results, "training": {**results["training"], "skipped_steps": steps}}))
    assert read_run(folder).notes == notes


@pytest.mark.parametrize(
    ("text", "note"),
    [
        (
            "model: {path: a}\nmodel: {path: b}\n",
            "can't be read: config.yaml:3: `model` is given twice, first in line 2",
        ),
        ("a: &a [&b [x, x]]\nb: &c [" + "*a, " * 999 + "]\nc: [" + "*c, " * 99 + "]\n", "stand for more than 100,000"),
    ],
    ids=["a key twice", "aliases of aliases"],
)
def test_a_configuration_from_elsewhere_is_read_as_one_of_ours(tmp_path: Path, text: str, note: str) -> None:
    folder = make_run(tmp_path / "run")
    (folder / "config.yaml").write_text((folder / "config.yaml").read_text().splitlines()[0] + "\n" + text)
    run = read_run(folder)
    assert run.config == {}
    assert any(note in one for one in run.notes)
