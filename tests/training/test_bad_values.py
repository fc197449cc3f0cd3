"""A table of bad values for every key of both dictionaries: each is refused in a sentence, named, or used."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from trl import SFTConfig

from helpers import TINY, tiny_config, train_only
from phinetune.checkpoints.tokenizer import open_config
from phinetune.config.model import ModelSection
from phinetune.config.run import RunConfig, make_config
from phinetune.errors import ConfigError
from phinetune.training.prepare import settle
from phinetune.training.rehearsal import rehearse, rehearse_adapter, rehearse_training
from phinetune.training.retired_keys import ALIASES, RETIRED_TRAINING, UNSLOTH_PARTS, UNSLOTH_PEFT
from phinetune.training.settings import Settings, make_training_args, read_settings

VALUES: dict[str, Any] = {
    "a dictionary": {"nonsense": 1},
    "a fraction": 3.7,
    "negative": -1,
    "zero": 0,
    "huge": 10**12,
    "beyond": 1e300,
    "infinite": float("inf"),
    "no number": float("nan"),
    "unknown name": "nonsense",
    "empty text": "",
    "null": None,
    "empty list": [],
    "list of names": ["nonsense"],
    "true": True,
    "false": False,
}
KEYS = [
    *(("training_config", field.name) for field in dataclasses.fields(SFTConfig)),
    *(("training_config", key) for key in (*RETIRED_TRAINING, *ALIASES)),
    *(("peft_config", field.name) for field in dataclasses.fields(LoraConfig)),
    *(("peft_config", key) for key in (*UNSLOTH_PEFT, *UNSLOTH_PARTS)),
]
NOTHING = (None, False, "", [])  # what asks for nothing, where it is not used


@pytest.fixture(scope="module")
def shape() -> Any:
    return open_config(ModelSection(path=TINY))


@pytest.fixture(scope="module")
def adapted(shape: Any) -> Any:
    return rehearse_adapter(read_settings({}, {}), shape)


def args_of(settings: Settings, folder: Path, *, fast: bool = False) -> SFTConfig:
    return make_training_args(settings, folder, torch.device("cpu"), torch.float32, fast=fast)


def with_value(chats: Path, folder: Path, dictionary: str, key: str, value: Any) -> RunConfig:
    tree = tiny_config(chats, folder, eval_strategy="steps", eval_steps=2).model_dump()
    tree[dictionary][key] = value
    return make_config(tree)


def says(key: str, lines: list[str]) -> bool:
    return any(key in line for line in lines)


MOVED = {**{old: new.now for old, new in (RETIRED_TRAINING | UNSLOTH_PEFT).items()}, **ALIASES}
WHOLE = dict.fromkeys(("finetune_language_layers", "finetune_attention_modules", "finetune_mlp_modules"), True)


def reaches_the_library(key: str, settings: Settings) -> bool:
    return (MOVED.get(key) or key) in settings.training | settings.peft


@pytest.mark.parametrize(("dictionary", "key"), KEYS, ids=[f"{d.split('_')[0]}-{k}" for d, k in KEYS])
def test_no_value_ends_in_a_traceback_or_is_ignored_in_silence(
    caplog: pytest.LogCaptureFixture,
    chats: Path,
    tmp_path: Path,
    shape: Any,
    adapted: Any,
    dictionary: str,
    key: str,
) -> None:
    wrong = []
    default = WHOLE.get(key, getattr(SFTConfig if dictionary == "training_config" else LoraConfig, key, None))
    for name, value in VALUES.items():
        caplog.clear()
        try:
            settings = settle(with_value(chats, tmp_path, dictionary, key, value)).settings
            used = reaches_the_library(key, settings)
            if used and dictionary == "training_config":
                rehearse_training(args_of(settings, tmp_path, fast=True), adapted)
            elif used:
                rehearse_adapter(settings, shape)
        except ConfigError as error:
            if not says(MOVED.get(key) or key, [*error.problems, *caplog.messages]):
                wrong.append(f"{name}: refused without its name: {error}")
            continue
        if not (used or says(key, [*settings.notes, *caplog.messages])) and value not in NOTHING and value != default:
            wrong.append(f"{name}: ignored in silence")
    assert not wrong


def tried(config: RunConfig, folder: Path, shape: Any) -> None:
    settings = settle(config).settings
    rehearse(settings, args_of(settings, folder), shape)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("training_config.learning_rate", -1, "it should be 0 or more (given: -1)"),
        ("training_config.learning_rate", float("nan"), "it should be a number, and at most 1e+15"),
        ("training_config.per_device_train_batch_size", 0, "it should be 1 or more"),
        ("training_config.per_device_eval_batch_size", True, "it should be a number (given: True)"),
        ("training_config.gradient_accumulation_steps", -4, "it should be 1 or more"),
        ("training_config.adam_beta2", 1.0, "it should be at least 0 and less than 1"),
        ("training_config.save_total_limit", 0, "it should be 1 or more, or null to keep all"),
        ("training_config.logging_steps", -1, "a whole number of steps, or a share of all steps"),
        ("training_config.max_steps", 0, "it should be 1 or more, or -1 to train for num_train_epochs"),
        ("training_config.seed", 2**32, "it should be from 0 to 4294967295"),
        ("training_config.optim", "adamw_troch", "did you mean `adamw_torch`?"),
        ("training_config.lr_scheduler_type", "cosin", "did you mean `cosine`?"),
        ("training_config.train_sampling_strategy", "by_length", "did you mean `group_by_length`?"),
        ("training_config.save_strategy", "step", "did you mean `steps`?"),
        ("training_config.log_level", "verbose", "it should be one of debug, info"),
        ("training_config.report_to", ["wandb"], "wandb is not installed"),
        ("training_config.report_to", "wandv", "did you mean `wandb`?"),
        ("training_config.debug", "underflow", "did you mean `underflow_overflow`?"),
        ("training_config.output_dir", "", "it should not be empty"),
        ("training_config.deepspeed", {"zero_optimization": {"stage": 2}}, "deepspeed is not installed"),
        ("training_config.dataloader_num_workers", 10**6, "it should be from 0 to 256"),
        ("training_config.ddp_timeout", 10**12, "it should be from 1 to 100000000 seconds"),
        ("training_config.accelerator_config", {"dispatch": 1}, "training_config.accelerator_config: "),
        ("training_config.num_train_epochs", 0, "it should be more than 0"),
        ("training_config.optim", "lomo", "training_config.optim, optim_args: You need to install `lomo_optim`"),
        ("training_config.lr_scheduler_kwargs", {"cycles": 2}, "unexpected keyword argument 'cycles'"),
        ("training_config.gradient_checkpointing_kwargs", "reentrant", "it should be a valid dictionary"),
        ("training_config.activation_offloading", True, "it moves activations off a GPU, and the run has none"),
        ("training_config.optim_args", "momentum", "training_config.optim_args: it should be options with their"),
        ("training_config.optim_args", "momentum=0.9,nesterov", "such as `momentum=0.9,nesterov=true`"),
        ("training_config.max_length", "many", "max_length: it should be a valid integer (given: 'many')"),
        ("peft_config.target_modules", 5, "it should be a valid list, or a valid string (given: 5)"),
        ("peft_config.r", 0, "it should be 1 or more"),
        ("peft_config.lora_dropout", 1.0, "it should be at least 0 and less than 1"),
        ("peft_config.lora_alpha", -16, "it should be more than 0"),
        ("peft_config.task_type", "SEQ_CLS", "a Phi-3 is trained as CAUSAL_LM, not as 'SEQ_CLS'"),
        ("peft_config.kasa_config", {"betta": 1}, "there is no key `betta` in it (there are beta, gamma)"),
        ("peft_config.arrow_config", {"top_k": 2}, "Arrow chooses among adapters"),
    ],
)
def test_a_refusal_says_what_would_do(
    chats: Path, tmp_path: Path, shape: Any, key: str, value: Any, words: str
) -> None:
    dictionary, name = key.split(".")
    config = with_value(chats, tmp_path, dictionary, name, value)
    with pytest.raises(ConfigError) as caught:
        tried(config, tmp_path, shape)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    "training",
    [
        {"learning_rate": 0, "max_grad_norm": 0, "warmup_steps": 10**12},
        {"optim": "sgd", "optim_args": "momentum=0.9", "lr_scheduler_type": "cosine_with_restarts"},
        {"eval_strategy": False, "save_strategy": False, "report_to": None, "optim_args": "", "fsdp": ""},
        {"per_device_train_batch_size": 10**12, "adam_beta1": 0, "torch_compile_mode": None},
    ],
)
def test_what_is_odd_but_sound_trains(chats: Path, tmp_path: Path, training: dict[str, Any]) -> None:
    made = train_only(tiny_config(chats, tmp_path / "run", **{**training, "max_steps": 1}))
    assert made.summary["steps"] == 1


def test_a_token_is_not_shown(chats: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"training_config\.hub_token: it should be a valid string$"):
        settle(tiny_config(chats, tmp_path, push_to_hub=True, hub_token=["hf_secret"]))


def test_names_of_modules_for_an_optimizer_that_takes_none_are_named(chats: Path, tmp_path: Path) -> None:
    notes = settle(tiny_config(chats, tmp_path, optim_target_modules=["o_proj"])).settings.notes
    assert notes == ["training_config: `optim_target_modules` has no effect: it is for `optim: galore_… or apollo_…`"]
    galore = tiny_config(chats, tmp_path, optim_target_modules=["o_proj"], optim="galore_adamw")
    assert settle(galore).settings.training["optim_target_modules"] == ["o_proj"]


def test_a_key_without_effect_is_named_once(chats: Path, tmp_path: Path) -> None:
    config = tiny_config(chats, tmp_path, do_train=True, run_name="mine", hub_model_id="me/mine", disable_tqdm=False)
    config.peft_config |= {"inference_mode": True, "ensure_weight_tying": True}
    settings = settle(config).settings
    assert sorted(note.split("`")[1] for note in settings.notes) == sorted(
        ["do_train", "run_name", "hub_model_id", "disable_tqdm", "inference_mode", "ensure_weight_tying"]
    )
    assert not {"do_train", "run_name", "disable_tqdm"} & settings.training.keys()
    assert not {"inference_mode", "ensure_weight_tying"} & settings.peft.keys()


def test_a_key_that_another_one_needs_has_its_effect_with_it(chats: Path, tmp_path: Path) -> None:
    config = tiny_config(chats, tmp_path, run_name="mine", report_to="tensorboard", dataloader_num_workers=1)
    config.training_config["dataloader_prefetch_factor"] = 2
    config.peft_config |= {"ensure_weight_tying": True, "trainable_token_indices": [1]}
    settings = settle(config).settings
    assert not says("has no effect", settings.notes)
    assert settings.training["run_name"] == "mine"
    assert settings.training["dataloader_prefetch_factor"] == 2
    assert settings.peft["ensure_weight_tying"] is True
