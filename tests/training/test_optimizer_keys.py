"""A setting that the optimizer does not read is named; one that it reads is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from helpers import TINY
from phinetune.checkpoints.random_shapes import parse_shape
from phinetune.training.rehearsal import rehearse
from phinetune.training.settings import make_training_args, read_settings


def lines(folder: Path, **training: Any) -> list[str]:
    settings = read_settings({}, training)
    args = make_training_args(settings, folder, torch.device("cpu"), torch.float32, fast=True)
    return rehearse(settings, args, parse_shape(TINY))


@pytest.mark.parametrize(
    ("training", "unread"),
    [
        ({"optim": "sgd", "adam_beta1": 0.8}, "training_config: `adam_beta1` has no effect: `optim: sgd`"),
        ({"optim": "adafactor", "adam_epsilon": 1e-6}, "training_config: `adam_epsilon` has no effect"),
        ({"optim": "lion_32bit", "adam_epsilon": 1e-6}, "training_config: `adam_epsilon` has no effect"),
        ({"optim_args": "rank=64"}, "training_config.optim_args: `rank` has no effect: `optim: adamw_torch"),
        ({"optim": "ademamix", "optim_args": "beta4=0.1"}, "training_config.optim_args: `beta4` has no effect"),
        ({"optim": "sgd", "optim_args": "momentum=0.9, damping=0.1"}, "training_config.optim_args: `damping` has no"),
    ],
)
def test_what_the_optimizer_does_not_read_is_named(tmp_path: Path, training: dict[str, Any], unread: str) -> None:
    found = lines(tmp_path, **training)
    assert len(found) == 1
    assert found[0].startswith(unread)


@pytest.mark.parametrize(
    "training",
    [
        {},
        {"adam_beta1": 0.8, "adam_beta2": 0.99, "adam_epsilon": 1e-6},
        {"optim": "lion_32bit", "adam_beta1": 0.8},
        {"optim": "sgd", "optim_args": "momentum=0.9,nesterov=true"},
        {"optim": "ademamix", "optim_args": "beta3=0.9999,t_alpha=10"},  # the first is the default, and read
    ],
)
def test_what_it_reads_is_not(tmp_path: Path, training: dict[str, Any]) -> None:
    assert lines(tmp_path, **training) == []
