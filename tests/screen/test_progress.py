"""The progress line says loss, learning rate, speed and time left."""

from __future__ import annotations

from rich.console import Console
from transformers import TrainerState

from phinetune.screen.progress import ProgressLine, spell_logs


def test_a_log_step_is_spelled() -> None:
    logs = {"loss": 1.23456, "learning_rate": 2e-4, "tokens_per_s": 131.4}
    assert spell_logs(logs) == "loss 1.2346  lr 2.00e-04  131 tokens/s"


def test_on_a_terminal_there_is_one_line_that_moves() -> None:
    import io

    screen = io.StringIO()
    line = ProgressLine(Console(file=screen, force_terminal=True, width=120))
    state = TrainerState(max_steps=10, is_world_process_zero=True)
    line.on_train_begin(None, state, None)  # type: ignore[arg-type]
    for step in range(1, 6):
        state.global_step = step
        line.on_log(None, state, None, logs={"loss": 2.5, "learning_rate": 1e-3, "tokens_per_s": 99.0})  # type: ignore[arg-type]
        line.on_step_end(None, state, None)  # type: ignore[arg-type]
    line._progress.refresh()  # type: ignore[union-attr]
    line.on_train_end(None, state, None)  # type: ignore[arg-type]
    text = screen.getvalue()
    assert "5/10" in text
    assert "loss 2.5000  lr 1.00e-03  99 tokens/s" in text
    assert "0s left" in text
    assert "step 5/10" not in text  # no log lines besides
