"""Keys of older scripts and of Unsloth's: taken, or refused, and always named."""

from __future__ import annotations

from typing import Any

import pytest

from phinetune.errors import ConfigError
from phinetune.training.settings import not_for_the_fast_engine, read_settings


@pytest.mark.parametrize(
    ("given", "taken"),
    [
        ({"group_by_length": True}, {"train_sampling_strategy": "group_by_length"}),
        ({"group_by_length": "true"}, {"train_sampling_strategy": "group_by_length"}),
        ({"group_by_length": False}, {}),
        ({"adafactor": True}, {"optim": "adafactor"}),
        ({"warmup_ratio": 0.1}, {"warmup_steps": 0.1}),
        ({"activation_checkpointing": False}, {"gradient_checkpointing": False}),
    ],
)
def test_a_key_of_older_scripts_is_translated(given: dict[str, Any], taken: dict[str, Any]) -> None:
    settings = read_settings({}, given)
    assert settings.training == {**read_settings({}, {}).training, **taken}
    assert len(settings.notes) == (0 if "activation_checkpointing" in given else 1)


@pytest.mark.parametrize(
    ("given", "taken"),
    [
        ({"use_gradient_checkpointing": "unsloth"}, {"gradient_checkpointing": True}),
        ({"use_gradient_checkpointing": False}, {"gradient_checkpointing": False}),
        ({"random_state": 3407}, {"seed": 3407}),
        ({"max_seq_length": 2048}, {"max_length": 2048}),
        ({"temporary_location": "buffers", "finetune_vision_layers": False}, {}),
    ],
)
def test_a_key_of_unsloth_is_taken_with_a_line(given: dict[str, Any], taken: dict[str, Any]) -> None:
    settings = read_settings({**given, "r": 8}, {})
    assert settings.training == {**read_settings({}, {}).training, **taken}
    assert settings.peft == read_settings({"r": 8}, {}).peft
    assert [note.split("`")[1] for note in settings.notes] == list(given)


def test_unsloths_own_call_is_taken_whole() -> None:
    """The defaults of `FastLanguageModel.get_peft_model` in its notebooks."""
    call = {
        "r": 16,
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        "lora_alpha": 16,
        "lora_dropout": 0,
        "bias": "none",
        "use_gradient_checkpointing": "unsloth",
        "random_state": 3407,
        "use_rslora": False,
        "loftq_config": None,
        "finetune_language_layers": True,
        "qat_scheme": None,
    }
    settings = read_settings(call, {"optim": "adamw_8bit", "seed": 3407})
    assert settings.training["seed"] == 3407
    assert "loftq_config" not in settings.peft
    assert len(settings.notes) == 2


def test_what_the_training_says_itself_is_kept_and_named() -> None:
    settings = read_settings({"random_state": 1}, {"seed": 2})
    assert settings.training["seed"] == 2
    assert "`random_state` is Unsloth's: not used, since training_config.seed is 2" in settings.notes[0]


@pytest.mark.parametrize("key", ["finetune_mlp_modules", "finetune_attention_modules", "finetune_language_layers"])
def test_leaving_out_a_part_by_unsloths_switches_is_refused(key: str) -> None:
    with pytest.raises(ConfigError, match=f"`{key}: False` is not used here; name the layers in target_modules"):
        read_settings({key: False}, {})


@pytest.mark.parametrize("task", ["SEQ_CLS", "SEQ_2_SEQ_LM", "FEATURE_EXTRACTION", "causal", ""])
def test_only_a_causal_language_model_is_trained(task: str) -> None:
    with pytest.raises(ConfigError, match=r"peft_config\.task_type: a Phi-3 is trained as CAUSAL_LM"):
        read_settings({"task_type": task}, {})
    assert read_settings({"task_type": None}, {}).peft["task_type"] == "CAUSAL_LM"


def test_trls_own_way_of_cutting_is_named_though_it_is_trls_default() -> None:
    for value in ("keep_start", "keep_end"):
        notes = read_settings({}, {"truncation_mode": value}).notes
        assert notes == [
            "training_config: `truncation_mode` has no effect: data.overlong says what becomes of a chat over "
            "max_length; answers are never cut"
        ]
    assert read_settings({}, {"truncation_mode": None, "padding_free": False, "pad_token": None}).notes == []


def test_what_only_the_plain_engine_reads_is_named() -> None:
    given = {
        "gradient_checkpointing": True,
        "torch_compile_mode": "default",
        "pad_to_multiple_of": 8,
        "use_liger_kernel": True,
    }
    lines = not_for_the_fast_engine(read_settings({}, given))
    assert [line.split("`")[1] for line in lines] == list(given)
    assert lines[0].endswith("the fast one goes by engine.activation_memory")
    assert not_for_the_fast_engine(read_settings({}, {"gradient_checkpointing": False})) == []


def test_a_part_of_compiling_turns_it_on() -> None:
    settings = read_settings({}, {"torch_compile_backend": "inductor"})
    assert settings.training["torch_compile"] is True
    assert settings.notes == ["training_config: `torch_compile_backend` turns `torch_compile` on"]
    assert read_settings({}, {"torch_compile_backend": None}).training.get("torch_compile") is None
