"""Which engine a run trains on, and what keeps the fast one from it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import Phi3Config, Phi3ForCausalLM

from helpers import GUIDE_PEFT, GUIDE_TRAINING, TINY
from phinetune.checkpoints.random_shapes import parse_shape
from phinetune.config.run import make_config
from phinetune.engine import phi3
from phinetune.engine.choice import FAST_VALUES, EngineChoice, choose_engine, model_class
from phinetune.training.settings import read_settings


def choose(
    training: dict[str, Any],
    peft: dict[str, Any],
    dtype: torch.dtype = torch.float32,
    shape: Phi3Config | None = None,
    **sections: Any,
) -> EngineChoice:
    config = make_config({"peft_config": peft, "training_config": training, **sections})
    settings = read_settings(peft, training)
    shape = shape or parse_shape(TINY)
    return choose_engine(config, settings.training, settings.peft, settings.max_length, dtype, shape)


def reason(training: dict[str, Any], peft: dict[str, Any], dtype: torch.dtype = torch.float32, **more: Any) -> Any:
    made = choose(training, peft, dtype, **more)
    assert (made.fast is None) is (made.reason is not None)
    return made.reason


@pytest.mark.parametrize(
    ("training", "peft", "words"),
    [
        ({"loss_type": "dft"}, {}, "training_config.loss_type"),
        ({"label_smoothing_factor": 0.1}, {}, "training_config.label_smoothing_factor"),
        ({"neftune_noise_alpha": 5.0}, {}, "training_config.neftune_noise_alpha"),
        ({"activation_offloading": True}, {}, "training_config.activation_offloading"),
        ({"fp16": True}, {}, "training_config.fp16"),
        ({"packing": True, "packing_strategy": "wrapped"}, {}, "training_config.packing_strategy"),
        ({"bf16": True}, {}, "training_config.bf16 over torch.float32 weights"),
        ({}, {"alora_invocation_tokens": [5]}, "peft_config.alora_invocation_tokens"),
        ({}, {"layer_replication": [(0, 2), (1, 2)]}, "peft_config.layer_replication"),
        ({}, {"trainable_token_indices": [5]}, "peft_config.trainable_token_indices"),
        ({}, {"target_parameters": ["weight"]}, "peft_config.target_parameters"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_what_has_no_fast_form_is_named(training: dict[str, Any], peft: dict[str, Any], words: str) -> None:
    found = reason(training, peft)
    assert found is not None
    assert found.startswith(words)


def test_the_plain_engine_can_be_asked_for() -> None:
    assert reason({}, {}, engine="plain") == "engine: plain"


@pytest.mark.parametrize(
    ("training", "peft"),
    [
        ({}, {}),
        ({k: v for k, v in GUIDE_TRAINING.items() if k != "bf16"}, GUIDE_PEFT),
        ({"use_liger_kernel": True}, {}),
        ({"loss_type": "nll", "packing": True, "label_smoothing_factor": 0.0, "fp16": False, "bf16": False}, {}),
        ({}, {"use_dora": True, "lora_bias": False, "modules_to_save": ["lm_head"], "use_rslora": True}),
    ],
    ids=["nothing given", "guide", "liger", "defaults given", "variants that a layer answers for"],
)
def test_all_else_is_fast(training: dict[str, Any], peft: dict[str, Any]) -> None:
    assert reason(training, peft) is None


def test_the_guides_bf16_is_fast_over_bfloat16_weights() -> None:
    assert reason(GUIDE_TRAINING, GUIDE_PEFT, torch.bfloat16) is None


@pytest.mark.parametrize(("dropout", "share"), [(0.0, True), (0.05, False)])
def test_dropout_turns_sharing_off(dropout: float, share: bool) -> None:
    """Each row draws masks of its own, so a shared beginning would be dropped alike in all."""
    made = choose({}, {"lora_dropout": dropout})
    assert made.fast
    assert made.fast.share is share


def test_a_model_without_a_packed_form_trains_plainly_and_is_loaded_as_transformers_own() -> None:
    shape = parse_shape(TINY)
    shape.hidden_act = "gelu"
    assert choose({}, {}, shape=shape).describe().endswith(": hidden_act `gelu`")
    assert model_class(shape, fast=True) is Phi3ForCausalLM
    assert model_class(parse_shape(TINY), fast=True) is phi3.Phi3ForCausalLM
    assert model_class(parse_shape(TINY), fast=False) is Phi3ForCausalLM


@pytest.mark.parametrize("key", FAST_VALUES)
def test_the_first_fast_value_is_the_librarys_default(key: str) -> None:
    """A key that is not given must count as its default."""
    from dataclasses import fields

    from trl import SFTConfig

    default = next(f.default for f in fields(SFTConfig) if f.name == key)
    assert default in FAST_VALUES[key]
