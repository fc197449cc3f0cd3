"""What scripts for other libraries give to a verb: taken, or refused with a word on what stands in its place."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig

import phinetune
from phinetune.api.sections import OF_TRAINERS, make_sections
from phinetune.errors import ConfigError


def test_every_argument_of_a_trainer_is_told_apart() -> None:
    train: Any = phinetune.train
    refused = {key: instead for key, instead in OF_TRAINERS.items() if key != "callbacks"}  # it takes them
    with pytest.raises(ConfigError) as caught:
        train("starter", **dict.fromkeys(refused))
    told = [f"train: it takes no `{key}`: {instead}" for key, instead in refused.items()]
    assert caught.value.problems == told
    tune: Any = phinetune.tune
    with pytest.raises(ConfigError, match="tune: it takes no `callbacks`: `train` takes them, for one run"):
        tune("starter", callbacks=[])


def test_an_argument_that_nobody_knows_is_pythons_own_error() -> None:
    train: Any = phinetune.train
    with pytest.raises(TypeError, match="unexpected keyword argument 'callback'"):
        train("starter", callback=1)


def test_objects_of_other_libraries_are_refused_in_a_line() -> None:
    with pytest.raises(ConfigError) as caught:
        make_sections(peft_config=LoraConfig(r=8))
    assert str(caught.value) == (
        "peft_config: it should be a dictionary, not a LoraConfig; write dict(…) in place of LoraConfig(…)"
    )
    with pytest.raises(ConfigError, match=r"^model: it should be a text or a dictionary, not a Linear; objects in"):
        make_sections(model=torch.nn.Linear(2, 2))
