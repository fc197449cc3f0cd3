"""Keys of `training_config` that older scripts have: retired ones, and those whose work another section does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Retired:
    """A key that older versions had.

    Attributes:
        now: the key that has replaced it. None: it has no effect any more.
        note: what to tell the user.
    """

    now: str | None
    note: str


RETIRED_TRAINING: dict[str, Retired] = {
    "overwrite_output_dir": Retired(None, "a finished run is only replaced by `--overwrite` (overwrite=True)"),
    "evaluation_strategy": Retired("eval_strategy", "taken as `eval_strategy`"),
    "max_seq_length": Retired("max_length", "taken as `max_length`"),
    "warmup_ratio": Retired("warmup_steps", "taken as `warmup_steps`, which below 1 is a share of all steps"),
    "no_cuda": Retired("use_cpu", "taken as `use_cpu`"),
    "tokenizer": Retired(None, "the tokenizer is the checkpoint's; model.tokenizer names another"),
    "group_by_length": Retired(None, "use `train_sampling_strategy: group_by_length`"),
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

# Keys of SFTConfig that are not used here, and what to use in their place.
ELSEWHERE = {
    "model_init_kwargs": "use the section `model`",
    "dataset_text_field": "use the section `data`",
    "completion_only_loss": "use data.loss_on",
    "assistant_only_loss": "use data.loss_on",
    "chat_template_path": "the checkpoint's own template is used; model.tokenizer names another",
    "eos_token": "stop tokens are found in the chat template",
    "pad_token": "padding is masked by length, so its token does not matter",
    "padding_free": "use `packing`",
    "truncation_mode": "use data.overlong",
}


def translate(given: Mapping[str, Any], problems: list[str], notes: list[str]) -> dict[str, Any]:
    """The dictionary without retired keys. Their replacements have their values."""
    translated: dict[str, Any] = {}
    for key, value in given.items():
        retired = RETIRED_TRAINING.get(key)
        if retired is None:
            translated[key] = value
            continue
        notes.append(f"training_config: `{key}` is retired: {retired.note}")
        if retired.now is None or value is None:
            continue
        if retired.now in given and given[retired.now] != value:
            problems.append(f"training_config: both `{key}` and `{retired.now}` are given; keep `{retired.now}`")
        translated.setdefault(retired.now, value)
    return translated
