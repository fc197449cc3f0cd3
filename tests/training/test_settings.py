"""The two dictionaries: the guide's run unchanged, old keys are translated, wrong ones refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import get_scheduler
from transformers.trainer_utils import SchedulerType

from helpers import GUIDE_PEFT, GUIDE_TRAINING
from phinetune.checkpoints.load import Loaded
from phinetune.errors import ConfigError
from phinetune.training.settings import make_lora_config, make_training_args, read_settings


def args_of(training: dict[str, Any], dtype: torch.dtype = torch.float32) -> Any:
    return make_training_args(read_settings({}, training), Path("out"), torch.device("cpu"), dtype)


def test_the_guides_dictionaries_are_taken_whole(tiny: Loaded) -> None:
    settings = read_settings(GUIDE_PEFT, GUIDE_TRAINING)
    args = make_training_args(settings, Path("checkpoint_dir"), torch.device("cpu"), torch.bfloat16)
    lora = make_lora_config(settings, tiny.model)
    assert (args.bf16, args.learning_rate, args.lr_scheduler_type, args.seed) == (True, 5e-6, "cosine", 0)
    assert (args.num_train_epochs, args.per_device_train_batch_size, args.save_total_limit) == (1, 4, 1)
    assert (args.logging_steps, args.save_steps) == (20, 100)
    assert args.get_warmup_steps(100) == 20
    # transformers 5.21 gave both a new name
    assert getattr(args, "activation_checkpointing", args.gradient_checkpointing)
    kwargs = getattr(args, "activation_checkpointing_kwargs", args.gradient_checkpointing_kwargs)
    assert kwargs == {"use_reentrant": False}
    assert (lora.r, lora.lora_alpha, lora.lora_dropout, lora.bias) == (16, 32, 0.05, "none")
    assert [note.split("`")[1] for note in settings.notes] == ["overwrite_output_dir", "warmup_ratio"]


def test_retired_keys_are_translated_with_a_note() -> None:
    old = {"evaluation_strategy": "steps", "max_seq_length": 77, "no_cuda": True, "save_safetensors": True}
    settings = read_settings({}, old)
    assert settings.training["eval_strategy"] == "steps"
    assert settings.max_length == settings.training["max_length"] == 77
    assert settings.training["use_cpu"] is True
    assert len(settings.notes) == 4


def test_an_old_and_a_new_key_that_disagree_are_refused() -> None:
    with pytest.raises(ConfigError, match="both `max_seq_length` and `max_length`"):
        read_settings({}, {"max_seq_length": 77, "max_length": 78})


def test_every_problem_of_both_dictionaries_is_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        read_settings(
            {"lora_alhpa": 1, "r": "many", "bias": "some"},
            {"learnin_rate": 1, "max_steps": 2.5, "packing": "perhaps", "dataset_text_field": "words"},
        )
    text = str(caught.value)
    assert len(caught.value.problems) == 7
    assert "training_config: there is no key `learnin_rate`; did you mean `learning_rate`?" in text
    assert "peft_config: there is no key `lora_alhpa`; did you mean `lora_alpha`?" in text
    assert "training_config.max_steps" in text
    assert "given: 2.5" in text
    assert "peft_config.bias: it should be 'none', 'all' or 'lora_only'" in text
    assert "`dataset_text_field` is not used here; name the column of the texts: data.columns: {text: NAME}" in text


def test_numbers_that_yaml_reads_as_text_are_numbers() -> None:
    settings = read_settings({"lora_dropout": "1e-1"}, {"learning_rate": "5e-6", "max_steps": "7"})
    assert settings.training["learning_rate"] == 5e-6
    assert settings.training["max_steps"] == 7
    assert settings.peft["lora_dropout"] == 0.1


def test_values_that_only_the_library_knows_are_refused_as_a_sentence(tiny: Loaded) -> None:
    with pytest.raises(ConfigError, match=r"training_config.tf32: --tf32 requires Ampere"):
        args_of({"tf32": True})
    with pytest.raises(ConfigError, match="peft_config: When `layers_pattern` is specified"):
        make_lora_config(read_settings({"layers_pattern": "layers", "target_modules": ["o_proj"]}, {}), tiny.model)


@pytest.mark.parametrize("turn", [list, reversed])
def test_the_key_that_is_named_is_the_one_that_the_reason_is_about(turn: Any) -> None:
    """`load_best_model_at_end` alone would be refused, too, but for want of evaluations, which are there."""
    given = {"load_best_model_at_end": True, "tf32": True, "eval_strategy": "epoch", "save_strategy": "epoch"}
    with pytest.raises(ConfigError, match=r"^training_config\.tf32: --tf32"):
        args_of({key: given[key] for key in turn(list(given))})


def test_null_is_no_option_of_an_optimizer() -> None:
    assert read_settings({}, {"optim_args": None}).training["optim_args"] is None


def test_what_is_told_keeps_the_order_of_the_dictionary() -> None:
    elsewhere = ["chat_template_path", "dataset_text_field"]
    idle = ["pad_token", "eos_token", "truncation_mode", "padding_free"]
    compiled = ["torch_compile_mode", "torch_compile_backend"]
    values = {"torch_compile_mode": "default", "torch_compile_backend": "inductor"}
    for turn in (list, reversed):
        with pytest.raises(ConfigError) as caught:
            read_settings({}, dict.fromkeys(turn(elsewhere), "x"))
        told = [f"training_config: `{key}` is not used here" for key in turn(elsewhere)]
        assert [problem.split(";")[0] for problem in caught.value.problems] == told
        settings = read_settings({}, {key: values[key] for key in turn(compiled)})
        assert settings.notes == [f"training_config: `{key}` turns `torch_compile` on" for key in turn(compiled)]
        assert settings.training["torch_compile"] is True
        notes = read_settings({}, dict.fromkeys(turn(idle), "x")).notes
        assert [note.split(": it ")[0].split("`")[1] for note in notes] == list(turn(idle))
    assert not read_settings({}, {**values, "torch_compile": False}).notes


def test_other_kinds_of_adapter_are_refused() -> None:
    with pytest.raises(ConfigError, match="peft_type must be LORA, not IA3"):
        read_settings({"peft_type": "IA3"}, {})
    assert read_settings({"peft_type": "LORA"}, {}).peft["r"] == 16


@pytest.mark.parametrize(
    ("given", "dtype", "bf16"),
    [
        ({}, torch.float32, False),
        ({}, torch.bfloat16, True),
        ({"bf16": True}, torch.float32, True),
        ({"bf16": False}, torch.bfloat16, False),
    ],
)
def test_bf16_follows_the_model_unless_it_is_given(given: dict[str, Any], dtype: torch.dtype, bf16: bool) -> None:
    assert args_of(given, dtype).bf16 is bf16


def test_nothing_is_reported_unless_asked() -> None:
    assert args_of({}).report_to == []
    assert args_of({"report_to": "tensorboard"}).report_to == ["tensorboard"]


def test_remote_code_has_no_effect() -> None:
    settings = read_settings({}, {"trust_remote_code": True})
    assert "trust_remote_code" not in settings.training
    assert "only transformers' own classes" in settings.notes[0]


def test_no_length_limit_can_be_asked_for() -> None:
    assert read_settings({}, {}).max_length == 4096  # until the rows are known
    assert read_settings({}, {}).without_auto().max_length == 1024
    assert read_settings({}, {"max_length": None}).max_length is None


def test_an_optimizer_of_bitsandbytes_has_a_stated_fallback(monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_settings({}, {"optim": "paged_adamw_32bit"}).training["optim"] == "paged_adamw_32bit"
    monkeypatch.setattr("phinetune.training.settings.find_spec", lambda name: None)
    settings = read_settings({}, {"optim": "paged_adamw_32bit"})
    assert settings.training["optim"] == "adamw_torch"
    assert any("paged_adamw_32bit" in note and "phinetune[quant]" in note for note in settings.notes)
    assert read_settings({}, {"optim": "adamw_torch_fused"}).training["optim"] == "adamw_torch_fused"
    with pytest.raises(ConfigError, match="needs bitsandbytes"):
        read_settings({}, {"optim": "paged_lion_8bit"})


@pytest.mark.parametrize(
    ("training", "notes"),
    [
        (
            {"lr_scheduler_type": "constant", "warmup_steps": 5},
            ["`warmup_steps` has no effect: `constant` has no warm-up; `constant_with_warmup` has"],
        ),
        (
            {"lr_scheduler_type": "reduce_lr_on_plateau", "warmup_steps": 0.1},
            ["`warmup_steps` has no effect: `reduce_lr_on_plateau` has no warm-up"],
        ),
        (
            {"lr_scheduler_type": "constant", "warmup_ratio": 0.1},
            [
                "`warmup_ratio` is retired: taken as `warmup_steps`, which below 1 is a share of all steps",
                "`warmup_steps` has no effect: `constant` has no warm-up; `constant_with_warmup` has",
            ],
        ),
        (
            {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 5, "lr_scheduler_kwargs": {"a": 1}},
            ["`lr_scheduler_kwargs` has no effect: `constant_with_warmup` takes no options"],
        ),
        ({"num_train_epochs": 2, "max_steps": 50}, ["`num_train_epochs` has no effect: `max_steps: 50` counts"]),
        ({"num_train_epochs": 3, "max_steps": "50"}, ["`num_train_epochs` has no effect: `max_steps: 50` counts"]),
        ({"num_train_epochs": 2, "max_steps": -1, "warmup_steps": 5, "lr_scheduler_kwargs": {}}, []),
        ({"lr_scheduler_type": "constant", "warmup_steps": 0, "max_steps": 50}, []),
    ],
)
def test_what_another_key_overrules_is_named_and_kept(training: dict[str, Any], notes: list[str]) -> None:
    settings = read_settings({}, training)
    assert settings.notes == [f"training_config: {note}" for note in notes]
    assert set(training) - {"warmup_ratio"} <= settings.training.keys()


@pytest.mark.parametrize("schedule", [one.value for one in SchedulerType])
def test_transformers_warms_up_where_no_note_says_otherwise(schedule: str) -> None:
    """Each schedule's first learning rate, with ten steps of warm-up."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    extra = {"num_decay_steps": 5} if schedule == "warmup_stable_decay" else {"min_lr": 1e-3}
    extra = extra if schedule in ("warmup_stable_decay", "cosine_with_min_lr", "cosine_warmup_with_min_lr") else {}
    get_scheduler(schedule, optimizer, 10, 100, extra)
    noted = bool(read_settings({}, {"lr_scheduler_type": schedule, "warmup_steps": 10}).notes)
    assert noted == (optimizer.param_groups[0]["lr"] == 1.0)
