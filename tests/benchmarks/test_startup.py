"""Where the time to the first step goes is read off the stack, and summed up."""

from __future__ import annotations

import sys
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import transformers
from benchmarks.startup import summed_up
from benchmarks.startup_worker import INNER, PHASES, placed

import phinetune


def frame_of(*calls: tuple[str, str]) -> FrameType:
    """The innermost frame of a stack of functions, outermost first: (file, name)."""
    inner: dict[str, Any] = {"look": lambda: sys._getframe(1)}
    for file, name in reversed(calls):
        code = compile(f"def {name}():\n    return look()", file, "exec")
        space: dict[str, Any] = {"look": inner["look"]}
        exec(code, space)
        inner = {"look": space[name]}
    found: FrameType = inner["look"]()
    return found


LIB = "/venv/lib/python3.11/site-packages"
OURS = "/work/src/phinetune"


@pytest.mark.parametrize(
    ("calls", "phase", "library"),
    [
        ([("/x/app.py", "main")], "other", None),
        ([(f"{OURS}/training/run.py", "train_run")], "setting up the trainer", None),
        (
            [(f"{OURS}/training/run.py", "train_run"), (f"{OURS}/checkpoints/load.py", "load_base")],
            "loading the model",
            None,
        ),
        (
            [(f"{OURS}/training/run.py", "train_run"), (f"{LIB}/transformers/trainer.py", "training_step")],
            "forward and backward",
            None,
        ),
        (
            [(f"{OURS}/training/prepare.py", "prepare_run"), ("<frozen importlib._bootstrap>", "_load")],
            "imports",
            "phinetune",
        ),
        (
            [(f"{LIB}/peft/x.py", "f"), ("<frozen importlib._bootstrap>", "_load"), (f"{LIB}/torch/y.py", "g")],
            "imports",
            "torch",
        ),
        ([("<frozen importlib._bootstrap>", "_load"), ("/usr/lib/python3.11/re.py", "f")], "imports", "python"),
    ],
)
def test_a_stack_is_put_down_to_a_phase(calls: list[tuple[str, str]], phase: str, library: str | None) -> None:
    assert placed(frame_of(*calls)) == (phase, library)


@pytest.mark.parametrize("place", [*PHASES, *INNER])
def test_the_functions_that_name_a_phase_are_there(place: str) -> None:
    file, _, name = place.partition(": ")
    package = phinetune if not file.startswith("transformers/") else transformers
    base = Path(str(package.__file__)).parents[1 if package is transformers else 0]
    assert f"def {name}(" in (base / file).read_text()


def test_rounds_are_summed_up_by_their_medians() -> None:
    rounds = [
        {
            "seconds": 10.0 * i,
            "processor_seconds": 8.0 * i,
            "phases": {"imports": (5.0 * i, 4.0 * i), "forward and backward": (2.0 * i, 2.0 * i)},
            "libraries": {"torch": (1.0 * i, 1.0 * i)},
        }
        for i in (1, 2, 9)
    ]
    rows = {row["what"]: row for row in summed_up(rounds)}
    assert list(rows)[:2] == ["to the end of the first step", "to the begin of the first step"]
    assert (rows["to the end of the first step"]["seconds"], rows["imports"]["processor"]) == (20.0, 8.0)
    assert rows["to the begin of the first step"]["processor"] == 12.0
    assert rows["imports: torch"]["share"] == 2.0 / 16.0
