"""Made curves of known kind, and what is said of each."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from phinetune.training.curve_words import Course, curve_words, read_course

Points = list[tuple[int, float]]
FALLING: Points = [(step, 2 * math.exp(-step / 20) + 0.5) for step in range(1, 101)]
LEVEL: Points = [(25, 1.2), (50, 0.9), (75, 0.85), (100, 0.845)]


def kinds(losses: Points = FALLING, held_out: Points = LEVEL, **facts: Any) -> list[str]:
    return [words.kind for words in curve_words(Course(losses, held_out, **{"rows": 500, **facts}))]


def text(kind: str, losses: Points = FALLING, held_out: Points = LEVEL, **facts: Any) -> str:
    said = curve_words(Course(losses, held_out, **{"rows": 500, **facts}))
    return next(words.text for words in said if words.kind == kind)


def test_a_curve_that_falls_and_levels_off_is_sound() -> None:
    assert kinds() == ["sound"]
    assert text("sound") == "Sound: the held-out loss fell from 1.2 to 0.845 by step 100 and has levelled off."


def test_a_held_out_loss_that_rises_is_overfitted_and_the_best_step_is_named() -> None:
    rising = [(25, 1.0), (50, 0.8), (75, 0.9), (100, 1.1)]
    assert kinds(held_out=rising) == ["overfitted"]
    kept = text("overfitted", held_out=rising, best_kept=50)
    assert kept == (
        "Overfitted: the held-out loss was lowest at step 50 (0.8) and rose to 1.1 by step 100. "
        "The checkpoint of step 50 is kept."
    )
    assert "`load_best_model_at_end: true`" in text("overfitted", held_out=rising)
    other = text("overfitted", held_out=rising, best_kept=70)
    assert other.endswith("The checkpoint of step 70 is kept, the best by `metric_for_best_model`.")
    assert kinds(held_out=[(25, 1.0), (50, 0.80), (75, 0.81)]) == ["sound"]  # within 2%


def test_a_held_out_loss_near_0_that_hardly_moves_is_sound() -> None:
    """A run whose answers were all right to the letter was called underfitted: 0.00016 had become 0.00015."""
    assert kinds(held_out=[(36, 0.0117), (72, 0.0002), (108, 0.00016), (144, 0.00015)]) == ["sound"]
    assert kinds(held_out=[(36, 0.0117), (72, 0.0002), (108, 0.00015), (144, 0.00016)]) == ["sound"]


def test_a_held_out_loss_that_still_falls_is_underfitted() -> None:
    falling = [(25, 2.0), (50, 1.5), (75, 1.2), (100, 1.0)]
    assert kinds(held_out=falling) == ["underfitted"]
    assert "from 1.2 at step 75 to 1 at step 100" in text("underfitted", held_out=falling)


@pytest.mark.parametrize(
    ("losses", "kind"),
    [
        ([(step, 2.0 + 0.01 * (step % 3)) for step in range(1, 41)], "flat"),
        ([(step, 1.0 + 0.05 * step) for step in range(1, 41)], "diverged"),
    ],
)
def test_a_training_loss_that_does_not_fall(losses: Points, kind: str) -> None:
    assert kinds(losses, []) == [kind]


def test_a_loss_near_nothing_from_the_first_is_not_called_flat() -> None:
    assert kinds([(step, 0.01) for step in range(1, 41)], []) == []


def test_rows_learnt_by_heart_have_a_loss_near_0_while_held_out_ones_do_not() -> None:
    learnt = [(step, max(0.01, 2 - step / 10)) for step in range(1, 41)]
    assert kinds(learnt) == ["by_heart"]
    assert text("by_heart", learnt).startswith("Rows were learnt by heart: the training loss is 0.01, and 0.845 on")
    assert kinds(learnt, [(10, 0.4), (20, 0.05), (40, 0.0499)]) == ["sound"]  # the task is learnt, not the rows
    assert "by_heart" not in kinds(learnt, likelihood=False)


def test_few_rows_are_told_and_a_stream_has_no_number_of_rows() -> None:
    assert kinds(rows=24) == ["few_rows", "sound"]
    assert text("few_rows", rows=24).startswith("Few rows: 24 rows were trained on.")
    assert kinds(rows=None) == ["sound"]


def test_the_highest_spikes_are_told_with_their_rows_in_order_of_steps() -> None:
    spikes = [{"step": step, "loss": float(loss), "usual": 1.0, "rows": ["What?", "No."]}
              for step, loss in ((9, 3), (20, 9), (30, 5), (40, 7))]  # fmt: skip
    said = [words.text for words in curve_words(Course(FALLING, LEVEL, spikes, 500)) if words.kind == "spike"]
    assert [sentence.split()[5] for sentence in said] == ["20", "30", "40"]
    assert said[0] == "Spike: the loss of step 20 was 9, where 1 was usual. Look at its rows: 'What?' | 'No.'"


def test_nothing_is_said_of_too_few_numbers() -> None:
    assert kinds([(1, 2.0), (2, 2.0)], [(2, 1.0)]) == []
    assert kinds([], []) == []


def test_the_course_is_read_from_the_files_and_broken_lines_are_left_out(tmp_path: Path) -> None:
    lines = [{"step": 2, "loss": 1.0}, {"step": 1, "loss": None}, {"step": 2, "eval_loss": 3.0}, {"loss": 4.0}]
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 3, "lo')
    course = read_course(metrics, tmp_path / "none.jsonl", rows=3)
    assert course == Course([(2, 1.0)], [(2, 3.0)], [], 3)
