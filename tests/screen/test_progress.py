"""The progress line says loss, learning rate, speed and time left."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from rich.console import Console
from rich.text import Text
from transformers import TrainerState

from phinetune.cpu_share import Usage
from phinetune.screen.progress import ProgressLine, spell_logs


def test_a_log_step_is_spelled() -> None:
    logs = {"loss": 1.23456, "learning_rate": 2e-4, "tokens_per_s": 131.4}
    assert spell_logs(logs) == "loss 1.2346  lr 2.00e-04  131 tokens/s"


ALONE: Any = SimpleNamespace(world_size=1)


def usages(*others: float) -> Iterator[Usage]:
    """A reading a second. In each second other programs used so many cores."""
    total = 0.0
    for second, used in enumerate((0.0, *others)):
        total += used
        yield Usage(float(second), total, 0.0)


def test_on_a_terminal_there_is_one_line_that_moves() -> None:
    screen = io.StringIO()
    line = ProgressLine(Console(file=screen, force_terminal=True, width=120), usages(*[0.0] * 5).__next__)
    state = TrainerState(max_steps=10, is_world_process_zero=True)
    line.on_train_begin(ALONE, state, None)  # type: ignore[arg-type]
    for step in range(1, 6):
        state.global_step = step
        line.on_log(None, state, None, logs={"loss": 2.5, "learning_rate": 1e-3, "tokens_per_s": 99.0})  # type: ignore[arg-type]
        line.on_step_end(None, state, None)  # type: ignore[arg-type]
    line._progress.refresh()  # type: ignore[union-attr]
    line.on_train_end(None, state, None)  # type: ignore[arg-type]
    text = screen.getvalue()
    assert "5/10" in text
    assert "loss 2.5000  lr 1.00e-03  99 tokens/s" in text
    assert re.search(r"\b\ds left", Text.from_ansi(text).plain)
    assert "step 5/10" not in text  # no log lines besides


def test_on_a_narrow_terminal_the_time_left_is_whole_beside_others() -> None:
    cores = float(os.cpu_count() or 1)
    screen = io.StringIO()
    line = ProgressLine(Console(file=screen, force_terminal=True, width=100), usages(*[cores] * 5).__next__)
    state = TrainerState(max_steps=144, is_world_process_zero=True)
    line.on_train_begin(ALONE, state, None)  # type: ignore[arg-type]
    for step in range(1, 6):
        state.global_step = step
        line.on_log(None, state, None, logs={"loss": 2.5, "learning_rate": 1e-3, "tokens_per_s": 20.0})  # type: ignore[arg-type]
        line.on_step_end(None, state, None)  # type: ignore[arg-type]
    screen.truncate(0)
    line._progress.refresh()  # type: ignore[union-attr]
    shown = Text.from_ansi(screen.getvalue()).plain
    line.on_train_end(None, state, None)  # type: ignore[arg-type]
    assert "5/144" in shown
    assert "s left" in shown
    assert "bus" in shown
    assert len(shown.splitlines()) == 1


def test_it_says_that_others_use_the_processor_while_they_do() -> None:
    cores = float(os.cpu_count() or 1)
    screen = io.StringIO()
    line = ProgressLine(Console(file=screen, width=40), usages(0.0, cores, 0.0).__next__)
    state = TrainerState(max_steps=10, is_world_process_zero=True)
    line.on_train_begin(ALONE, state, None)  # type: ignore[arg-type]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for step in (2, 4, 6):
            state.global_step = step
            line.on_log(None, state, None, logs={"loss": 2.5})  # type: ignore[arg-type]
    finally:
        torch.set_num_threads(threads)
    quiet, busy, after = screen.getvalue().splitlines()
    assert quiet == "step 2/10  loss 2.5000  0s left"
    # The steps before others began, and those beside them, say nothing of the steps that come: no time left at first.
    assert busy == f"step 4/10  loss 2.5000  busy: other programs use {cores:.1f} of {cores:.0f} cores"
    assert after == "step 6/10  loss 2.5000"


def test_processes_of_one_run_are_no_others() -> None:
    screen = io.StringIO()
    line = ProgressLine(Console(file=screen, width=120), usages().__next__)
    state = TrainerState(max_steps=10, global_step=0, is_world_process_zero=True)
    line.on_train_begin(SimpleNamespace(world_size=2), state, None)  # type: ignore[arg-type]
    state.global_step = 2
    line.on_log(None, state, None, logs={"loss": 2.5})  # type: ignore[arg-type]
    assert "busy" not in screen.getvalue()
