"""A run is told once that it makes the chosen answers unlikely too."""

from __future__ import annotations

import logging

import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments

from phinetune.training.falling import FallingWarning


def told(logps: list[float], margins: list[float], caplog: pytest.LogCaptureFixture) -> int:
    caplog.clear()
    watch, state = FallingWarning(), TrainerState(is_world_process_zero=True)
    args = TrainingArguments(use_cpu=True)
    with caplog.at_level(logging.WARNING, "phinetune"):
        for step, (logp, margin) in enumerate(zip(logps, margins, strict=True), 1):
            state.global_step = step
            state.log_history.append({"logps/chosen": logp, "rewards/margins": margin})
            watch.on_log(args, state, TrainerControl())
    return len(caplog.records)


def test_it_is_told_once_where_chosen_answers_fall_and_the_margin_grows(caplog: pytest.LogCaptureFixture) -> None:
    margins = [0.1 * n for n in range(9)]
    assert told([-100.0 - 5 * n for n in range(9)], margins, caplog) == 1
    assert "less likely (log-probability -105.0 at first, now -1" in caplog.text
    assert told([-100.0 + n for n in range(9)], margins, caplog) == 0
    assert told([-100.0 - n / 3 for n in range(9)], margins, caplog) == 0
    assert told([-100.0 - 5 * n for n in range(9)], [-m for m in margins], caplog) == 0
    assert told([-100.0, -150.0], [0.0, 1.0], caplog) == 0
