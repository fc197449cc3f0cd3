"""Callbacks that a program gives to `train`: called, obeyed, and refused where they are none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback

from helpers import TINY
from phinetune import train
from phinetune.errors import ConfigError, RunError


class Seen(TrainerCallback):
    """Keeps the losses it is told of, and stops after a step."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.losses: list[float] = []
        self.stop_at = stop_at

    def on_log(self, args: Any, state: Any, control: Any, **told: Any) -> None:
        if "loss" in told["logs"]:
            self.losses.append(told["logs"]["loss"])

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.stop_at:
            control.should_training_stop = True


def trained(chats: Path, run: Path, callbacks: list[Any] | None, **more: Any) -> Any:
    config = {"max_steps": 4, "logging_steps": 1, "learning_rate": 0.01, "output_dir": str(run), "save_strategy": "no"}
    return train(str(TINY), {"train": str(chats), "eval": 0.25}, None, config, callbacks=callbacks, **more)


def test_a_callback_sees_each_logged_step(chats: Path, tmp_path: Path) -> None:
    seen = Seen()
    made = trained(chats, tmp_path / "run", [seen])
    assert len(seen.losses) == 4
    assert not made.results["training"]["stopped_early"]


def test_a_run_that_a_callback_ends_is_finished_and_compared(chats: Path, tmp_path: Path) -> None:
    made = trained(chats, tmp_path / "run", [Seen(stop_at=2)])
    assert (made.results["training"]["steps"], made.results["training"]["stopped_early"]) == (2, True)
    assert not made.stopped
    assert made.results["evaluation"]["tuned"]
    with pytest.raises(RunError, match=r"stopped early at step 2, as .* or a callback asked"):
        trained(chats, tmp_path / "run", None, resume=True)


def test_what_is_no_callback_is_refused_with_all_others(chats: Path, tmp_path: Path) -> None:
    class Wants(TrainerCallback):
        def __init__(self, what: str) -> None:
            self.what = what

    with pytest.raises(ConfigError) as refused:
        trained(chats, tmp_path / "run", [print, Wants, Seen])
    first, second = refused.value.problems
    assert first == "callbacks[0]: a `builtin_function_or_method` is no transformers.TrainerCallback"
    assert second.startswith("callbacks[1]: Wants() can't be made")
    with pytest.raises(ConfigError, match=r"callbacks: a list of transformers.TrainerCallback, not a `Seen`"):
        trained(chats, tmp_path / "run", Seen())  # type: ignore[arg-type]
    assert not (tmp_path / "run").exists()
