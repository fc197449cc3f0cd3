"""The guide's two dictionaries, validated and turned into `peft.LoraConfig` and `trl.SFTConfig`.

Keys of older scripts are taken along: each retired key is translated, or left out, with a line that says so.
"""

from __future__ import annotations

import dataclasses
import logging
import re
import typing
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from pydantic import ConfigDict, TypeAdapter, ValidationError
from trl import SFTConfig

from phinetune.errors import ConfigError, unknown_key

logger = logging.getLogger(__name__)

# Where this project departs from SFTConfig's defaults, and why.
TRAINING_DEFAULTS: dict[str, Any] = {
    "learning_rate": 2e-4,  # SFTConfig's 2e-5 is for full fine-tuning; LoRA takes ten times as much
    "report_to": "none",  # nothing leaves the machine unless asked
    "logging_nan_inf_filter": False,  # a non-finite loss stops the run; it must not be averaged away
}
PEFT_DEFAULTS: dict[str, Any] = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "task_type": "CAUSAL_LM"}


@dataclass(frozen=True)
class Retired:
    """A key that older versions had: the key in its place (None: no effect any more), and what to say."""

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

# Keys of SFTConfig whose job another section does here.
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


# Keys whose annotation lists fewer values than the library takes (`pissa_niter_16`).
OPEN_ENDED = {"init_lora_weights"}


@dataclass(frozen=True)
class Settings:
    """Both dictionaries, validated.

    Attributes:
        training: `SFTConfig` arguments, complete but for what the machine decides.
        peft: `LoraConfig` arguments; `target_modules` not yet looked up in a model.
        notes: a line for every retired key that was translated or left out.
    """

    training: dict[str, Any]
    peft: dict[str, Any]
    notes: list[str]

    @property
    def max_length(self) -> int | None:
        """Tokens a chat may have; None is no limit."""
        value = self.training.get("max_length", _field(SFTConfig, "max_length").default)
        return None if value is None else int(value)

    @property
    def step_timeout(self) -> float:
        """Seconds that processes wait for one another in a step."""
        return float(self.training.get("ddp_timeout", _field(SFTConfig, "ddp_timeout").default))


def read_settings(peft_config: Mapping[str, Any], training_config: Mapping[str, Any]) -> Settings:
    """Check every key and value of both dictionaries.

    Raises:
        ConfigError: all unknown keys (with the nearest known one) and all ill-typed values at once.
    """
    problems: list[str] = []
    notes: list[str] = []
    training = _translate(training_config, problems, notes)
    known = {f.name for f in dataclasses.fields(SFTConfig)}
    training = _checked("training_config", SFTConfig, training, known | set(RETIRED_TRAINING), problems)
    for key in list(training):
        if key in ELSEWHERE and training[key] not in (None, False, _field(SFTConfig, key).default):
            problems.append(f"training_config: `{key}` is not used here; {ELSEWHERE[key]}")
    _optimizer(training, problems, notes)
    if training.pop("trust_remote_code", False):
        notes.append("training_config: `trust_remote_code` has no effect: only transformers' own classes are used")
    peft = {key: value for key, value in peft_config.items() if key != "peft_type"}
    if str(peft_config.get("peft_type", "LORA")).upper().removeprefix("PEFTTYPE.") != "LORA":
        problems.append(f"peft_config: peft_type must be LORA, not {peft_config['peft_type']}")
    peft = _checked("peft_config", LoraConfig, peft, {f.name for f in dataclasses.fields(LoraConfig)}, problems)
    if problems:
        raise ConfigError(problems)
    return Settings({**TRAINING_DEFAULTS, **training}, {**PEFT_DEFAULTS, **peft}, notes)


# Optimizers of bitsandbytes, which scripts for QLoRA name.
BITSANDBYTES = re.compile(r"paged_|.*(8bit|_bnb|lion_|ademamix)")


def _optimizer(training: dict[str, Any], problems: list[str], notes: list[str]) -> None:
    """Without bitsandbytes its AdamW is torch's, which takes the same steps with more memory; others are refused."""
    name = str(training.get("optim", ""))
    if not BITSANDBYTES.match(name) or find_spec("bitsandbytes"):
        return
    if "adamw" not in name:
        problems.append(f"training_config.optim: `{name}` needs bitsandbytes; pip install 'phinetune[quant]'")
        return
    training["optim"] = "adamw_torch"
    notes.append(f"training_config: `optim: {name}` needs bitsandbytes (phinetune[quant]); `adamw_torch` in its place")


def _translate(given: Mapping[str, Any], problems: list[str], notes: list[str]) -> dict[str, Any]:
    kept: dict[str, Any] = {}
    for key, value in given.items():
        retired = RETIRED_TRAINING.get(key)
        if retired is None:
            kept[key] = value
            continue
        notes.append(f"training_config: `{key}` is retired: {retired.note}")
        if retired.now is None or value is None:
            continue
        if retired.now in given and given[retired.now] != value:
            problems.append(f"training_config: both `{key}` and `{retired.now}` are given; keep `{retired.now}`")
        kept.setdefault(retired.now, value)
    return kept


def _checked(
    where: str, schema: type, given: Mapping[str, Any], known: set[str], problems: list[str]
) -> dict[str, Any]:
    hints = typing.get_type_hints(schema)
    kept: dict[str, Any] = {}
    for key, value in given.items():
        if key not in known:
            problems.append(unknown_key(where, key, known))
            continue
        try:
            kept[key] = value if key in OPEN_ENDED else _coerce(value, hints[key])
        except ValidationError as error:
            message = error.errors()[0]["msg"].replace("Input should", "it should")
            problems.append(f"{where}.{key}: {message} (given: {value!r})")
    return kept


def _coerce(value: Any, hint: Any) -> Any:
    """Plain values as the schema types them (YAML reads `5e-6` as text); anything else as it was given."""
    checked = TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True)).validate_python(value)
    return checked if type(checked) in (bool, int, float, str) else value


def make_lora_config(settings: Settings, targets: Any) -> LoraConfig:
    """The adapter's configuration with `target_modules` as found in the model.

    Raises:
        ConfigError: PEFT refuses a value or a combination.
    """
    try:
        return LoraConfig(**{**settings.peft, "target_modules": targets})
    except (ValueError, TypeError, ImportError) as error:
        raise ConfigError(f"peft_config: {error}") from error


def make_training_args(
    settings: Settings, output_dir: Path, device: torch.device, dtype: torch.dtype, *, fast: bool = False
) -> SFTConfig:
    """TRL's arguments for this device and dtype. `bf16` follows the model's dtype unless given.

    Args:
        fast: the engine computes in the weights' dtype, packs, and saves memory itself, so autocast, TRL's packing
            and transformers' gradient checkpointing are off.

    Raises:
        ConfigError: TRL or transformers refuses a value or a combination.
    """
    given = dict(settings.training)
    if given.get("bf16") is None and not given.get("fp16"):
        given["bf16"] = dtype == torch.bfloat16
    given["output_dir"] = str(output_dir)
    given.setdefault("use_cpu", device.type == "cpu")
    if fast:
        # The plain loss_type keeps TRL 1.14 from putting its own forward in the model's place.
        off = ("bf16", "packing", "gradient_checkpointing", "torch_compile")
        given |= {"loss_type": "nll", "dataset_kwargs": {"skip_prepare_dataset": True}, **dict.fromkeys(off, False)}
    given["disable_tqdm"] = True  # phinetune.screen.progress draws the line
    try:
        with warnings.catch_warnings():
            # `gradient_checkpointing` is the guide's name for what transformers is renaming.
            warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*", category=FutureWarning)
            args = SFTConfig(**given)
    except (ValueError, TypeError, ImportError, KeyError, RuntimeError) as error:
        raise ConfigError(f"training_config: {error}") from error
    return one_gpu(args)


def one_gpu(args: SFTConfig) -> SFTConfig:
    """The arguments for one GPU a process. Where a single process sees several, transformers would split each batch
    among them (`DataParallel`), which packed rows can't be.
    """
    if args.n_gpu > 1:
        logger.warning(
            "%d GPUs are there, and one process trains on the first; `accelerate launch --num_processes %d` takes all",
            args.n_gpu,
            args.n_gpu,
        )
        args._n_gpu = 1  # as transformers itself does where the model's place is settled
    return args


def _field(schema: type, name: str) -> dataclasses.Field[Any]:
    return next(f for f in dataclasses.fields(schema) if f.name == name)
