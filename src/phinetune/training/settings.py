"""Validates the guide's two dictionaries and turns them into `peft.LoraConfig` and `trl.SFTConfig`.

Keys of older scripts are accepted. A retired key is translated or left out, and a line in the log says so.
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
from phinetune.training.retired_keys import ELSEWHERE, RETIRED_TRAINING, translate

logger = logging.getLogger(__name__)

# The defaults that differ from SFTConfig's, and why.
TRAINING_DEFAULTS: dict[str, Any] = {
    "learning_rate": 2e-4,  # SFTConfig's 2e-5 is for full fine-tuning; LoRA needs ten times as much
    "report_to": "none",  # nothing leaves the machine unless the user asks for it
    "logging_nan_inf_filter": False,  # a loss that is not finite must stop the run, not be replaced by a mean
}
PEFT_DEFAULTS: dict[str, Any] = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "task_type": "CAUSAL_LM"}


# Keys for which the library takes more values than its annotation lists (`pissa_niter_16`).
OPEN_ENDED = {"init_lora_weights"}


@dataclass(frozen=True)
class Settings:
    """Both dictionaries, validated.

    Attributes:
        training: the arguments of `SFTConfig`, but for those that depend on the machine.
        peft: the arguments of `LoraConfig`. `target_modules` is as the user gave it, not yet matched with a model.
        notes: a line for the log about each key or value that was translated or left out.
    """

    training: dict[str, Any]
    peft: dict[str, Any]
    notes: list[str]

    @property
    def max_length(self) -> int | None:
        """How many tokens a chat may have; None is no limit."""
        value = self.training.get("max_length", _field(SFTConfig, "max_length").default)
        return None if value is None else int(value)

    @property
    def step_timeout(self) -> float:
        """How many seconds processes wait for each other in a step."""
        return float(self.training.get("ddp_timeout", _field(SFTConfig, "ddp_timeout").default))


def read_settings(peft_config: Mapping[str, Any], training_config: Mapping[str, Any]) -> Settings:
    """Check every key and value of both dictionaries.

    Raises:
        ConfigError: there are unknown keys, values of the wrong type, or keys that are not used here; the error lists
            all of them.
    """
    problems: list[str] = []
    notes: list[str] = []
    training = translate(training_config, problems, notes)
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


# The names of bitsandbytes' optimizers, which scripts for QLoRA use.
BITSANDBYTES = re.compile(r"paged_|.*(8bit|_bnb|lion_|ademamix)")


def _optimizer(training: dict[str, Any], problems: list[str], notes: list[str]) -> None:
    """Without bitsandbytes, replace its AdamW by torch's, which takes the same steps with more memory. Its other
    optimizers are refused.
    """
    name = str(training.get("optim", ""))
    if not BITSANDBYTES.match(name) or find_spec("bitsandbytes"):
        return
    if "adamw" not in name:
        problems.append(f"training_config.optim: `{name}` needs bitsandbytes; pip install 'phinetune[quant]'")
        return
    training["optim"] = "adamw_torch"
    notes.append(f"training_config: `optim: {name}` needs bitsandbytes (phinetune[quant]); `adamw_torch` in its place")


def _checked(
    where: str, schema: type, given: Mapping[str, Any], known: set[str], problems: list[str]
) -> dict[str, Any]:
    """The keys that the schema knows, with values of its types. Everything else is added to `problems`."""
    hints = typing.get_type_hints(schema)
    checked: dict[str, Any] = {}
    for key, value in given.items():
        if key not in known:
            problems.append(unknown_key(where, key, known))
            continue
        try:
            checked[key] = value if key in OPEN_ENDED else _coerce(value, hints[key])
        except ValidationError as error:
            message = error.errors()[0]["msg"].replace("Input should", "it should")
            problems.append(f"{where}.{key}: {message} (given: {value!r})")
    return checked


def _coerce(value: Any, hint: Any) -> Any:
    """The value in the schema's type, if that is a number, a text or a boolean (YAML reads `5e-6` as text). Else the
    value as it was given.
    """
    checked = TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True)).validate_python(value)
    return checked if type(checked) in (bool, int, float, str) else value


def make_lora_config(settings: Settings, targets: Any) -> LoraConfig:
    """The adapter's configuration.

    Args:
        targets: `target_modules` in the model's names, from `resolve_targets`.

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
    """TRL's arguments for this device and dtype. If `bf16` is not given, it follows the model's dtype.

    Args:
        fast: whether the fast engine trains. It computes in the weights' dtype, packs and saves memory itself, so
            autocast, TRL's packing and transformers' gradient checkpointing are off. Its collator picks its columns.

    Raises:
        ConfigError: TRL or transformers refuses a value or a combination.
    """
    given = dict(settings.training)
    if given.get("bf16") is None and not given.get("fp16"):
        given["bf16"] = dtype == torch.bfloat16
    given["output_dir"] = str(output_dir)
    given.setdefault("use_cpu", device.type == "cpu")
    if fast:
        # With `loss_type: nll`, TRL 1.14 does not replace the model's forward by its own.
        off = ("bf16", "packing", "gradient_checkpointing", "torch_compile", "remove_unused_columns")
        given |= {"loss_type": "nll", "dataset_kwargs": {"skip_prepare_dataset": True}, **dict.fromkeys(off, False)}
    given["disable_tqdm"] = True  # phinetune.screen.progress shows the progress
    try:
        with warnings.catch_warnings():
            # The guide uses the name `gradient_checkpointing`, which transformers is about to change.
            warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*", category=FutureWarning)
            args = SFTConfig(**given)
    except (ValueError, TypeError, ImportError, KeyError, RuntimeError) as error:
        raise ConfigError(f"training_config: {error}") from error
    return one_gpu(args)


def one_gpu(args: SFTConfig) -> SFTConfig:
    """The arguments, limited to one GPU per process.

    If a single process sees several GPUs, transformers would split each batch among them (`DataParallel`). Packed rows
    can't be split.
    """
    if args.n_gpu > 1:
        logger.warning(
            "there are %d GPUs, but one process trains on the first only; `accelerate launch --num_processes %d` uses "
            "all of them",
            args.n_gpu,
            args.n_gpu,
        )
        args._n_gpu = 1  # transformers does the same for a model that is already on its device
    return args


def _field(schema: type, name: str) -> dataclasses.Field[Any]:
    return next(f for f in dataclasses.fields(schema) if f.name == name)
