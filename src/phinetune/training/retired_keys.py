"""Keys that other scripts have: retired ones, those of Unsloth, and those whose work another section does."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


def _as_it_is(value: Any) -> Any:
    return value


@dataclass(frozen=True)
class Retired:
    """A key that older versions had, or that another library takes there.

    Attributes:
        now: the key that has replaced it. None: it has no effect any more.
        note: what to tell the user.
        value: the value of the new key, from the one of the old key; None leaves the new key out.
    """

    now: str | None
    note: str
    value: Callable[[Any], Any] = _as_it_is


RETIRED_TRAINING: dict[str, Retired] = {
    "overwrite_output_dir": Retired(None, "a finished run is only replaced by `--overwrite` (overwrite=True)"),
    "evaluation_strategy": Retired("eval_strategy", "taken as `eval_strategy`"),
    "max_seq_length": Retired("max_length", "taken as `max_length`"),
    "warmup_ratio": Retired("warmup_steps", "taken as `warmup_steps`, which below 1 is a share of all steps"),
    "no_cuda": Retired("use_cpu", "taken as `use_cpu`"),
    "tokenizer": Retired(None, "the tokenizer is the checkpoint's; model.tokenizer names another"),
    "group_by_length": Retired(
        "train_sampling_strategy",
        "taken as `train_sampling_strategy: group_by_length` where it is true",
        lambda value: "group_by_length" if is_true(value) else None,
    ),
    "adafactor": Retired(
        "optim", "taken as `optim: adafactor` where it is true", lambda value: "adafactor" if is_true(value) else None
    ),
    "dispatch_batches": Retired(None, "batches are never cut up between processes"),
    "split_batches": Retired(None, "batches are never cut up between processes"),
    "use_legacy_prediction_loop": Retired(None, "it is gone from transformers"),
    "per_gpu_train_batch_size": Retired("per_device_train_batch_size", "taken as `per_device_train_batch_size`"),
    "per_gpu_eval_batch_size": Retired("per_device_eval_batch_size", "taken as `per_device_eval_batch_size`"),
    "save_safetensors": Retired(None, "adapters are always safetensors"),
    "logging_dir": Retired(None, "trackers write where their own settings say"),
    "dataset_batch_size": Retired(None, "batches are chosen while encoding"),
    "num_of_sequences": Retired(None, "packing needs no estimate"),
    "chars_per_token": Retired(None, "packing counts tokens"),
    "use_liger": Retired(None, "phinetune brings its own kernels"),
    "fp16_backend": Retired(None, "it has had no effect for years"),
    "fp16_opt_level": Retired(None, "Apex is gone"),
    "half_precision_backend": Retired(None, "torch's autocast is the only one"),
    "use_ipex": Retired(None, "torch covers it"),
    "use_mps_device": Retired(None, "set model.device: mps"),
    "jit_mode_eval": Retired(None, "it is gone from transformers"),
    "include_inputs_for_metrics": Retired(None, "use `include_for_metrics`"),
    "include_tokens_per_second": Retired(None, "tokens per second are always counted"),
    "push_to_hub_model_id": Retired("hub_model_id", "taken as `hub_model_id`"),
    "push_to_hub_token": Retired("hub_token", "taken as `hub_token`"),
    "torchdynamo": Retired(None, "use `torch_compile`"),
    "ray_scope": Retired(None, "it is gone from transformers"),
    "past_index": Retired(None, "it is gone from transformers"),
    "mp_parameters": Retired(None, "it is gone from transformers"),
    "tpu_num_cores": Retired(None, "it is gone from transformers"),
}

# The newer names of two keys, which only some of the supported versions know.
ALIASES = {
    "activation_checkpointing": "gradient_checkpointing",
    "activation_checkpointing_kwargs": "gradient_checkpointing_kwargs",
}


def is_true(value: Any) -> bool:
    """Whether a value that may come from a text means true."""
    return str(value).lower() in ("true", "1", "yes", "on")


# Keys that Unsloth's `get_peft_model` takes beside those of LoraConfig. `now` is a key of training_config.
UNSLOTH_PEFT: dict[str, Retired] = {
    "use_gradient_checkpointing": Retired(
        "gradient_checkpointing",
        "taken as training_config.gradient_checkpointing; the fast engine goes by engine.activation_memory",
        lambda value: str(value).lower() == "unsloth" or is_true(value),
    ),
    "random_state": Retired("seed", "taken as training_config.seed"),
    "max_seq_length": Retired("max_length", "taken as training_config.max_length"),
    "model": Retired(None, "the section `model` names the base"),
    "temporary_location": Retired(None, "nothing is offloaded to a folder"),
    "finetune_vision_layers": Retired(None, "the model has no vision layers"),
}
# Keys of Unsloth's by which parts of the model are left out, and the value that leaves out nothing.
UNSLOTH_PARTS: dict[str, Any] = {
    "finetune_language_layers": True,
    "finetune_attention_modules": True,
    "finetune_mlp_modules": True,
    "qat_scheme": None,
}

# Keys of SFTConfig that would change what is learnt and are refused, and what to use in their place.
ELSEWHERE = {
    "dataset_text_field": "name the column of the texts: data.columns: {text: NAME}",
    "chat_template_path": "the checkpoint's own template is used; model.tokenizer names another",
}


def translate(given: Mapping[str, Any], problems: list[str], notes: list[str]) -> dict[str, Any]:
    """The dictionary without retired keys. Their replacements have their values."""
    translated: dict[str, Any] = {}
    for key, value in given.items():
        retired = RETIRED_TRAINING.get(key)
        now = retired.now if retired else ALIASES.get(key, key)
        if retired:
            notes.append(f"training_config: `{key}` is retired: {retired.note}")
            value = retired.value(value)
        if now is None or (value is None and now != key):
            continue
        if now != key and now in given and given[now] != value:
            problems.append(f"training_config: both `{key}` and `{now}` are given; keep `{now}`")
        if now == key:
            translated[key] = value
        else:
            translated.setdefault(now, value)
    return translated


def translate_peft(
    given: Mapping[str, Any], training: dict[str, Any], problems: list[str], notes: list[str]
) -> dict[str, Any]:
    """`peft_config` without the keys of Unsloth's `get_peft_model`. Their replacements are added to `training`, unless
    they are there already.
    """
    kept: dict[str, Any] = {}
    for key, value in given.items():
        moved = UNSLOTH_PEFT.get(key)
        if key in UNSLOTH_PARTS:
            if value not in (None, UNSLOTH_PARTS[key]):
                problems.append(f"peft_config: `{key}: {value}` is not used here; name the layers in target_modules")
        elif moved is None:
            kept[key] = value
        else:
            notes.append(f"peft_config: `{key}` is Unsloth's: {_moved(moved, value, training)}")
    return kept


def _moved(moved: Retired, value: Any, training: dict[str, Any]) -> str:
    """What becomes of one key of Unsloth's."""
    if moved.now is None or value is None:
        return moved.note
    wanted = moved.value(value)
    if training.setdefault(moved.now, wanted) != wanted:
        return f"not used, since training_config.{moved.now} is {training[moved.now]}"
    return moved.note
