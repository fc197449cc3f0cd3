"""Validates the guide's two dictionaries and turns them into `peft.LoraConfig` and `trl.SFTConfig`.

Keys of older scripts are accepted. A retired key is translated or left out, and a line in the log says so.
"""

from __future__ import annotations

import dataclasses
import logging
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from transformers import PreTrainedModel
from trl import SFTConfig

from phinetune.checkpoints.named_modules import resolve_names, told_split
from phinetune.errors import ConfigError, reason_of, told_as
from phinetune.training.auto_settings import AUTO, AUTO_PEFT, AUTO_TRAINING, LENGTH_CAP, RACE
from phinetune.training.checked_keys import checked
from phinetune.training.deepspeed import wrong_with_deepspeed
from phinetune.training.hub_wish import HubWish, take_wish
from phinetune.training.idle_keys import IDLE_PEFT, IDLE_TRAINING, NEEDS_PEFT, NEEDS_TRAINING, leave_out_idle, overruled
from phinetune.training.retired_keys import (
    ELSEWHERE,
    RETIRED_TRAINING,
    UNSLOTH_PEFT,
    translate,
    translate_peft,
)
from phinetune.training.spread import KEYS as SPREAD_KEYS
from phinetune.training.spread import take_spread
from phinetune.training.value_rules import plain_name

logger = logging.getLogger(__name__)

# The defaults that differ from SFTConfig's, and why.
TRAINING_DEFAULTS: dict[str, Any] = {
    # Until the rules of `auto_settings` choose, and for runs of versions before them: SFTConfig's 2e-5 is for full
    # fine-tuning.
    "learning_rate": 2e-4,
    "report_to": "none",  # nothing leaves the machine unless the user asks for it
    "logging_nan_inf_filter": False,  # a loss that is not finite must be seen, not be replaced by a mean
}
PEFT_DEFAULTS: dict[str, Any] = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "task_type": "CAUSAL_LM"}
COMPILED = ("torch_compile_backend", "torch_compile_mode")  # each of them turns `torch_compile` on
# What the fast engine does in a way of its own, and the knob for it.
PLAIN_ONLY = {
    "gradient_checkpointing": "engine.activation_memory",
    "gradient_checkpointing_kwargs": "engine.activation_memory",
    "torch_compile_backend": "engine.compile",
    "torch_compile_mode": "engine.compile",
    "pad_to_multiple_of": "data.packing",
    "use_liger_kernel": "kernels of its own",
    "liger_kernel_config": "kernels of its own",
}


@dataclass(frozen=True)
class Settings:
    """Both dictionaries, validated.

    Attributes:
        training: the arguments of `SFTConfig`, but for those that depend on the machine.
        peft: the arguments of `LoraConfig`. Names of modules are as the user gave them, not yet matched with a model.
        notes: a line for the log about each key or value that was translated or left out.
        push: where the finished run is pushed; None if it stays here.
        auto: the keys that are chosen by rules once the rows are known; until then they have fixed defaults.
        race: whether a race decides the learning rate; then it is among `auto`.
        spread: whether the base is spread over the processes.
    """

    training: dict[str, Any]
    peft: dict[str, Any]
    notes: list[str]
    push: HubWish | None = None
    auto: frozenset[str] = frozenset()
    race: bool = False
    spread: bool = False

    @property
    def max_length(self) -> int | None:
        """How many tokens a chat may have; None is no limit."""
        default = LENGTH_CAP if "max_length" in self.auto else _field(SFTConfig, "max_length").default
        value = self.training.get("max_length", default)
        return None if value is None else int(value)

    @property
    def step_timeout(self) -> float:
        """How many seconds processes wait for each other in a step."""
        return float(self.training.get("ddp_timeout", _field(SFTConfig, "ddp_timeout").default))

    def without_auto(self) -> Settings:
        """The settings with fixed defaults for all that was not given, as runs had them before there were rules."""
        until_chosen = self.auto & {"eval_strategy", "eval_steps"}
        kept = {key: value for key, value in self.training.items() if key not in until_chosen}
        return dataclasses.replace(self, training=kept, auto=frozenset())


def read_settings(peft_config: Mapping[str, Any], training_config: Mapping[str, Any]) -> Settings:
    """Check every key and value of both dictionaries.

    Raises:
        ConfigError: there are unknown keys, values of the wrong type, or keys that are not used here; the error lists
            all of them.
    """
    problems: list[str] = []
    notes: list[str] = []
    training = translate(training_config, problems, notes)
    peft = translate_peft(peft_config, training, problems, notes)
    race = is_race(training)
    training = {**training, "learning_rate": AUTO} if race else training
    auto = _left_open(training, peft)
    training = {key: value for key, value in training.items() if key not in AUTO_TRAINING or not _is_auto(value)}
    peft = {key: value for key, value in peft.items() if key not in AUTO_PEFT or not _is_auto(value)}
    training = _read_training(training, problems, notes)
    push = take_wish(training, problems, notes)
    spread = take_spread(training, problems, notes)
    peft = _read_peft(peft, problems, notes)
    notes += told_split(peft) if not problems else []
    if problems:
        raise ConfigError(problems)
    return Settings({**TRAINING_DEFAULTS, **training}, {**PEFT_DEFAULTS, **peft}, notes, push, auto, race, spread)


def is_race(training: Mapping[str, Any]) -> bool:
    """Whether `training_config` lets a race decide the learning rate."""
    return str(training.get("learning_rate")).lower() == RACE


def _is_auto(value: Any) -> bool:
    return isinstance(value, str) and value.lower() == AUTO


def _left_open(training: Mapping[str, Any], peft: Mapping[str, Any]) -> frozenset[str]:
    """The keys of both dictionaries that are `auto`, or not given."""
    found = {key for key in AUTO_TRAINING if _is_auto(training.get(key, AUTO))}
    found |= {key for key in AUTO_PEFT if _is_auto(peft.get(key, AUTO))}
    if "eval_steps" not in found or training.get("do_eval") is False:  # TRL's users know them to mean this
        found -= {"eval_strategy"} if "eval_strategy" not in training else set()
    if "eval_strategy" not in found and "eval_strategy" not in training:
        found -= {"eval_steps"}
    return frozenset(found)


def _read_training(given: Mapping[str, Any], problems: list[str], notes: list[str]) -> dict[str, Any]:
    """`training_config` without retired keys, checked, and without what has no effect."""
    defaults = _defaults(SFTConfig) | TRAINING_DEFAULTS
    for key, value in given.items():
        if key in ELSEWHERE and value not in (None, defaults[key]):
            problems.append(f"training_config: `{key}` is not used here; {ELSEWHERE[key]}")
    given = {key: value for key, value in given.items() if key not in ELSEWHERE}
    if "torch_compile" not in given:
        compiling = [key for key in given if key in COMPILED and given[key] is not None]
        notes += [f"training_config: `{key}` turns `torch_compile` on" for key in compiling]
        given |= {"torch_compile": True} if compiling else {}
    active = leave_out_idle("training_config", given, IDLE_TRAINING, NEEDS_TRAINING, defaults, notes)
    training = checked("training_config", SFTConfig, active, RETIRED_TRAINING.keys(), problems)
    notes += overruled(training)
    _optimizer(training, problems, notes)
    problems += wrong_with_deepspeed(training.get("deepspeed"))
    if training.get("learning_rate") == 0:
        notes.append("training_config: `learning_rate: 0` leaves the adapter as it begins")
    return training


def _read_peft(given: Mapping[str, Any], problems: list[str], notes: list[str]) -> dict[str, Any]:
    """`peft_config` checked, and without what has no effect."""
    peft = {key: value for key, value in given.items() if key != "peft_type"}
    if str(given.get("peft_type", "LORA")).upper().removeprefix("PEFTTYPE.") != "LORA":
        problems.append(f"peft_config: peft_type must be LORA, not {given['peft_type']}")
    task = peft.pop("task_type", None)
    if task is not None and plain_name(task) != "CAUSAL_LM":
        problems.append(f"peft_config.task_type: a Phi-3 is trained as CAUSAL_LM, not as {task!r}; leave the key out")
    if peft.get("arrow_config"):
        problems.append("peft_config.arrow_config: Arrow chooses among adapters that are there; a run trains one")
    needs = {} if peft.get("trainable_token_indices") else NEEDS_PEFT
    active = leave_out_idle("peft_config", peft, IDLE_PEFT, needs, _defaults(LoraConfig), notes)
    return checked("peft_config", LoraConfig, active, UNSLOTH_PEFT.keys(), problems)


def _defaults(schema: type) -> dict[str, Any]:
    return {
        f.name: f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
        for f in dataclasses.fields(schema)
    }


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


def make_lora_config(settings: Settings, model: PreTrainedModel) -> LoraConfig:
    """The adapter's configuration, with the names of this model's modules.

    Args:
        model: the base without an adapter; its weights don't matter.

    Raises:
        ConfigError: an entry matches nothing in the model, or PEFT refuses a value or a combination.
    """
    named = resolve_names(model, settings.peft)
    with told_as(ConfigError, "peft_config"):
        return LoraConfig(**named)


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
    if given.get("activation_offloading") and device.type == "cpu":
        raise ConfigError("training_config.activation_offloading: it moves activations off a GPU, and the run has none")
    given["output_dir"] = str(output_dir)
    given.setdefault("use_cpu", device.type == "cpu")
    if fast:
        # With `loss_type: nll`, TRL 1.14 does not replace the model's forward by its own.
        off = ("bf16", "packing", "gradient_checkpointing", "torch_compile", "remove_unused_columns")
        given = {key: value for key, value in given.items() if key not in PLAIN_ONLY}
        given |= {"loss_type": "nll", "dataset_kwargs": {"skip_prepare_dataset": True}, **dict.fromkeys(off, False)}
    given = {key: value for key, value in given.items() if key not in SPREAD_KEYS}
    given["disable_tqdm"] = True  # phinetune.screen.progress shows the progress
    try:
        args = _sft_config(given)
    except Exception as error:  # the libraries raise errors of any class for a bad value
        reason = reason_of(error)
        raise ConfigError(f"{_refused_key(given, reason)}: {reason}") from error
    return one_gpu(args)


def _sft_config(given: Mapping[str, Any]) -> SFTConfig:
    with warnings.catch_warnings():
        # The guide uses the name `gradient_checkpointing`, which transformers is about to change.
        warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*", category=FutureWarning)
        return SFTConfig(**given)


def _refused_key(given: Mapping[str, Any], reason: str) -> str:
    """The key of `training_config` that is refused alone for this reason; the whole dictionary if only the combination
    is.
    """
    of_the_machine = {key: given[key] for key in ("output_dir", "use_cpu", "bf16") if key in given}
    for key in given:
        if key in of_the_machine:
            continue
        try:
            _sft_config({**of_the_machine, key: given[key]})
        except Exception as error:
            if reason_of(error) == reason:
                return f"training_config.{key}"
    return "training_config"


def check_plain(settings: Settings) -> None:
    """Make sure that the plain engine has the libraries that the settings name.

    Raises:
        ConfigError: liger-kernel is not installed.
    """
    if settings.training.get("use_liger_kernel") and not find_spec("liger_kernel"):
        raise ConfigError("training_config.use_liger_kernel: liger-kernel is not installed; leave the key out")


def not_for_the_fast_engine(settings: Settings) -> list[str]:
    """A line for each key that only the plain engine reads, for the log of a run on the fast one."""
    return [
        f"training_config: `{key}` is for the plain engine; the fast one goes by {knob}"
        for key, knob in PLAIN_ONLY.items()
        if settings.training.get(key)
    ]


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
