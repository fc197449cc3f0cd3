"""Which values the keys of both dictionaries take beyond their types: ranges of numbers, and names."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from functools import cache
from typing import Any

from accelerate.utils import DynamoBackend
from torch.multiprocessing import get_all_start_methods
from transformers.debug_utils import DebugOption
from transformers.integrations import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations
from transformers.trainer_utils import HubStrategy, IntervalStrategy, SaveStrategy, SchedulerType
from transformers.training_args import OptimizerNames

from phinetune.logs import LEVELS


@dataclass(frozen=True)
class Range:
    """A rule for a number: whether a value keeps it, and what a sentence says after "it should be"."""

    words: str
    holds: Callable[[Any], bool]


COUNT = Range("1 or more", lambda value: value >= 1)
POSITIVE = Range("more than 0", lambda value: value > 0)
NOT_NEGATIVE = Range("0 or more", lambda value: value >= 0)
BELOW_ONE = Range("at least 0 and less than 1", lambda value: 0 <= value < 1)
SHARE = Range("from 0 to 1", lambda value: 0 <= value <= 1)
SEED = Range("from 0 to 4294967295", lambda value: 0 <= value < 2**32)
WORKERS = Range("from 0 to 256", lambda value: 0 <= value <= 256)
INTERVAL = Range(
    "a whole number of steps, or a share of all steps between 0 and 1",
    lambda value: value > 0 and (value < 1 or value == int(value)),
)
WARMUP = Range(
    "0, a whole number of steps, or a share of all steps between 0 and 1",
    lambda value: value == 0 or INTERVAL.holds(value),
)
LARGEST = 1e15  # far above any sensible value, and far below what overflows in a library

RANGES: Mapping[str, Range] = {
    "adam_beta1": BELOW_ONE,
    "adam_beta2": BELOW_ONE,
    "adam_epsilon": POSITIVE,
    "data_seed": SEED,
    "dataloader_num_workers": WORKERS,
    "dataloader_prefetch_factor": COUNT,
    "ddp_bucket_cap_mb": COUNT,
    "ddp_timeout": Range("from 1 to 100000000 seconds", lambda value: 1 <= value <= 10**8),
    "eval_delay": NOT_NEGATIVE,
    "eval_steps": INTERVAL,
    "gradient_accumulation_steps": COUNT,
    "label_smoothing_factor": SHARE,
    "learning_rate": NOT_NEGATIVE,
    "logging_steps": INTERVAL,
    "max_grad_norm": NOT_NEGATIVE,
    "max_length": Range("2 or more, or null for no limit", lambda value: value >= 2),
    "max_steps": Range("1 or more, or -1 to train for num_train_epochs", lambda value: value == -1 or value >= 1),
    "neftune_noise_alpha": Range("more than 0 and at most 1000000, or null", lambda value: 0 < value <= 10**6),
    "num_train_epochs": POSITIVE,
    "pad_to_multiple_of": COUNT,
    "per_device_eval_batch_size": COUNT,
    "per_device_train_batch_size": COUNT,
    "save_steps": INTERVAL,
    "save_total_limit": Range("1 or more, or null to keep all", lambda value: value >= 1),
    "seed": SEED,
    "torch_empty_cache_steps": COUNT,
    "warmup_steps": WARMUP,
    "weight_decay": NOT_NEGATIVE,
    # Of peft_config.
    "lora_alpha": POSITIVE,
    "lora_dropout": BELOW_ONE,
    "r": COUNT,
}


def plain_name(value: Any) -> str:
    """A name as YAML has it, of a text or of a library's `Enum`."""
    return str(getattr(value, "value", value))


def _values(kind: type[Enum]) -> tuple[str, ...]:
    return tuple(map(plain_name, kind))


STRATEGIES = ("eval_strategy", "logging_strategy", "save_strategy")  # YAML reads their `no` as false
COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
NAMES: Mapping[str, tuple[str, ...]] = {
    "dataloader_multiprocessing_context": tuple(get_all_start_methods()),
    "ddp_backend": ("nccl", "gloo", "mpi", "xccl", "hccl", "cncl"),
    "debug": _values(DebugOption),
    "eval_strategy": _values(IntervalStrategy),
    "hub_strategy": _values(HubStrategy),
    "log_level": (*LEVELS, "passive"),
    "log_level_replica": (*LEVELS, "passive"),
    "logging_strategy": _values(IntervalStrategy),
    "loss_type": ("nll", "dft", "chunked_nll"),
    "lr_scheduler_type": _values(SchedulerType),
    "optim": _values(OptimizerNames),
    "packing_strategy": ("bfd", "bfd_split", "wrapped"),
    "pad_to_multiple_of": ("auto",),
    "report_to": (*INTEGRATION_TO_CALLBACK, "all", "none"),
    "save_strategy": _values(SaveStrategy),
    "torch_compile_backend": tuple(name.lower() for name in _values(DynamoBackend)),
    "torch_compile_mode": COMPILE_MODES,
    "train_sampling_strategy": ("random", "sequential", "group_by_length"),
    # Of peft_config.
    "bias": ("none", "all", "lora_only"),
}
OPTIONS = re.compile(r"[^=,]+=[^=,]+(,[^=,]+=[^=,]+)*")  # as transformers cuts `optim_args`
CUT = re.compile(r"[\s,]+")  # `debug` and `report_to` may list several names in one text


def broken_rule(key: str, value: Any) -> str | None:
    """What is wrong with the value of a key, as the end of a sentence; None if nothing is.

    Args:
        value: of the type that the key takes.
    """
    if value is None or isinstance(value, bool):
        return None
    if isinstance(value, (int, float)):
        return _broken_range(key, value)
    if isinstance(value, (list, tuple)):
        found = [_broken_name(key, one) for one in value if isinstance(one, (str, Enum))]
    elif key == "optim_args" and not OPTIONS.fullmatch(str(value).replace(" ", "")):
        return "it should be options with their values, such as `momentum=0.9,nesterov=true`"
    elif isinstance(value, (str, Enum)):
        parts = CUT.split(value) if key == "debug" and value and not isinstance(value, Enum) else [value]
        found = [_broken_name(key, one) for one in parts]
    else:
        found = []
    return next((problem for problem in found if problem), None)


def _broken_range(key: str, value: Any) -> str | None:
    if not math.isfinite(value) or abs(value) > LARGEST:
        return f"it should be a number, and at most {LARGEST:.0e}"
    rule = RANGES.get(key)
    return None if rule is None or rule.holds(value) else f"it should be {rule.words}"


def _broken_name(key: str, value: str | Enum) -> str | None:
    name = plain_name(value)
    known = NAMES.get(key)
    if known is None:
        return None
    if name not in known:
        near = difflib.get_close_matches(name.lower(), known, n=1)
        hint = f"; did you mean `{near[0]}`?" if near else ""
        return f"it should be one of {', '.join(known)}{hint}"
    if key == "report_to" and name not in ("all", "none") and name not in _trackers():
        return f"{name} is not installed; install it, or leave it out"
    return None


@cache
def _trackers() -> frozenset[str]:
    """The trackers that are installed."""
    return frozenset(get_available_reporting_integrations())
