"""A run is told once that it makes the chosen answers unlikely too, whatever the lengths of its answers."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments

from phinetune.config.objective import ObjectiveSection
from phinetune.training.falling import FallingWarning
from phinetune.training.objectives.registry import make_objective

TOKENS = [50, 400, 90, 60, 500, 70, 300, 40, 350]  # labels of the chosen answers of each line
GROWING = [0.1 * n for n in range(9)]


def told(
    kind: str, a_label: Sequence[float], margins: Sequence[float], caplog: pytest.LogCaptureFixture, **knobs: Any
) -> int:
    """How often it is told of lines whose labels have fallen by so many nats each from −1."""
    caplog.clear()
    objective = make_objective(ObjectiveSection(kind=kind, **knobs))
    watch, state = FallingWarning(objective), TrainerState(is_world_process_zero=True)
    args, beta = TrainingArguments(use_cpu=True), 0.1
    with caplog.at_level(logging.WARNING, "phinetune"):
        for step, (fall, margin, tokens) in enumerate(zip(a_label, margins, TOKENS, strict=False), 1):
            by_reference = kind in ("dpo", "kto")
            logps = -(1 + fall) * (1 if kind == "orpo" else tokens)
            rewards = beta * (-fall * tokens if by_reference else logps)
            line = {"logps/chosen": logps, "rewards/chosen": rewards, "rewards/margins": margin, "nll_loss": 1 + fall}
            state.global_step = step
            state.log_history.append(line)
            watch.on_log(args, state, TrainerControl())
    return len(caplog.records)


@pytest.mark.parametrize(
    ("kind", "knobs"),
    [("dpo", {}), ("kto", {}), ("orpo", {}), ("simpo", {"loss_type": "sigmoid"})],
    ids=["dpo", "kto", "orpo", "simpo"],
)
def test_it_is_told_once_where_chosen_answers_fall_and_the_margin_grows(
    kind: str, knobs: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """Lines are of answers of 40 to 500 labels, whose log-probabilities say nothing beside each other."""
    falling = [0.04 * n for n in range(9)]
    assert told(kind, falling, GROWING, caplog, **knobs) == 1
    assert "the chosen answers have become less likely" in caplog.text
    assert told(kind, [0.0] * 9, GROWING, caplog, **knobs) == 0
    assert told(kind, [-one for one in falling], GROWING, caplog, **knobs) == 0
    assert told(kind, [one / 10 for one in falling], GROWING, caplog, **knobs) == 0
    assert told(kind, falling, [-one for one in GROWING], caplog, **knobs) == 0
    assert told(kind, [0.0, 0.3], [0.0, 1.0], caplog, **knobs) == 0


def test_lines_of_hard_rows_are_no_fall(caplog: pytest.LogCaptureFixture) -> None:
    """Where there is no reference, a line may lie below others for its rows alone."""
    assert told("orpo", [0.0, 0.5, 0.0, 0.1, 0.6, 0.0, 0.4, 0.1, 0.5], GROWING, caplog) == 0


def test_imitation_has_no_chosen_answers() -> None:
    assert make_objective(ObjectiveSection(kind="sft")).chosen_likelihood({"loss": 1.0}) is None
