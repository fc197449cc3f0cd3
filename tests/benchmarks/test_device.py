"""The script for one GPU, in its form for a CPU: two layers, few steps."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.fresh import Deadline, measure
from benchmarks.worker import KINDS

from benchmarks import device

WAYS = {name: device.WAYS[name] for name in ("TRL + PEFT", "TRL + Liger", device.OURS)}


def here(kind: str, deadline: Deadline, **options: Any) -> dict[str, Any]:
    """A measurement in this process, which has loaded the libraries already."""
    if deadline.left < 0:
        return measure(kind, deadline, **options)
    return {**KINDS[kind](**options), "peak_gb": 1.0}


@pytest.fixture
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs the script's CPU form into a folder of its own; the parts that it kept, by name."""
    monkeypatch.setenv("PHINETUNE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(device, "WAYS", WAYS)
    monkeypatch.setattr(device, "measure", here)
    absent = {"liger_kernel": None, "bitsandbytes": None}
    monkeypatch.setattr(device, "find_spec", lambda name: absent.get(name))

    def run(deadline: Deadline, **options: Any) -> dict[str, Any]:
        book = dataclasses.replace(device.BOOK, folder=tmp_path / "results")
        page, file = device.run(True, deadline, book, lambda table: None, **options)
        assert page.read_text() == book.page()
        parts: dict[str, Any] = json.loads(file.read_text())["parts"]
        return parts

    return run


def test_the_ways_train_on_the_same_weights_and_rows(measured: Any) -> None:
    parts = measured(Deadline(), testing=False)
    theirs, liger, ours = parts["bfloat16"]["rows"]
    for row in (theirs, ours):
        assert row["tokens"] == device.TINY_STEPS * device.TINY_CHATS * device.TINY_LENGTH
        assert row["tokens_per_s"] > 0
    assert ours["first_loss"] == pytest.approx(theirs["first_loss"], rel=1e-3)
    assert ours["last_loss"] == pytest.approx(theirs["last_loss"], rel=1e-3)
    assert ours["times"] == pytest.approx(theirs["step_seconds"] / ours["step_seconds"])
    assert liger == {"what": "TRL + Liger", "failed": "liger-kernel is not installed"}
    default, _, ours = parts["dpo"]["rows"]
    assert ours["first_loss"] == pytest.approx(default["first_loss"], rel=1e-3)
    assert ours["times"] == pytest.approx(default["step_seconds"] / ours["step_seconds"])
    theirs, ours = parts["answers"]["rows"]
    assert ours["tokens"] == theirs["tokens"] == sum(device.TINY_AT_ONCE) * device.TINY_ANSWER
    assert ours["times"] == pytest.approx(theirs["seconds"] / ours["seconds"])
    (nf4,) = parts["nf4"]["rows"]
    assert "bitsandbytes is not installed" in nf4["failed"]


def test_what_the_time_is_too_short_for_is_named(measured: Any) -> None:
    parts = measured(Deadline(-1))
    assert "not done" in parts["tests"]["rows"][0]["failed"]
    assert [row["failed"] for row in parts["bfloat16"]["rows"] if "Liger" not in row["what"]] == [
        "left out: the time was over"
    ] * 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to measure")
def test_the_whole_shape_is_refused_without_a_gpu() -> None:
    assert "no CUDA device" in (device.why_not() or "")


def test_a_process_that_fails_gives_its_last_line(tmp_path: Path) -> None:
    found = measure("copy", adapter="", base=str(tmp_path / "nowhere"), out=str(tmp_path / "out"))
    assert "nowhere" in found["failed"]
    assert "\n" not in found["failed"]
