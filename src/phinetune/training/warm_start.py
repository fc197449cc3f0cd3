"""A run that goes on from an adapter that is there (`model.adapter`): the adapter's own settings, and its weights.

The new run trains an adapter of the same shape for the same base, and begins with the numbers of the old one. The old
one stays as it is.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file

from phinetune.checkpoints.adapter_fit import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from phinetune.checkpoints.adapters import read_adapter_config, read_base, usable_adapter
from phinetune.checkpoints.foreign_adapters import peft_folder, sixteen_bit_base
from phinetune.config.model import ModelSection
from phinetune.config.run import RunConfig
from phinetune.errors import ConfigError, ModelError
from phinetune.files import file_digest
from phinetune.training.auto_settings import AUTO, AUTO_PEFT
from phinetune.training.settings import PEFT_DEFAULTS, Settings
from phinetune.training.value_rules import plain_name

logger = logging.getLogger(__name__)

STARTED_FROM = "started_from"  # the key of start.json
# What the user may still set: it is no part of the adapter's weights.
FREE = ("lora_dropout", "task_type")
# Keys of an adapter's configuration that say nothing about its shape.
LEFT_OUT = (
    *("base_model_name_or_path", "revision", "inference_mode", "peft_type", "peft_version", "auto_mapping"),
    *("init_lora_weights", "runtime_config", "loftq_config", "eva_config", "corda_config", "lora_ga_config", *FREE),
)


def with_adapters_base(config: RunConfig) -> RunConfig:
    """The configuration with the base of `model.adapter`, where the user names none.

    Raises:
        ModelError: the folder's record of its base can't be read.
    """
    section = config.model
    if section.adapter is None or "path" in section.model_fields_set:
        return config
    folder = peft_folder(section.adapter)
    base = read_base(folder)
    if base is None:
        return config.model_copy(update={"model": section.model_copy(update=_base_of_another_tool(folder))})
    named: dict[str, Any] = {"path": base.path, "revision": base.revision}
    named |= {} if base.seed is None else {"seed": base.seed}
    return config.model_copy(update={"model": section.model_copy(update=named)})


def _base_of_another_tool(folder: Path) -> dict[str, str]:
    """The keys of `model` for the base that an adapter without a record of phinetune names; empty if it names none."""
    name = read_adapter_config(folder).base_model_name_or_path
    if not name:
        return {}
    path, held = sixteen_bit_base(name)
    return {"path": path, **held}


def settle_adapter(config: RunConfig, settings: Settings) -> tuple[RunConfig, Settings]:
    """Configuration and settings with the shape of `model.adapter`, if the run goes on from one.

    Raises:
        ConfigError: `peft_config` asks for another shape, or the run would be written over the adapter.
        ModelError: the adapter can't be used on this base.
    """
    if config.model.adapter is None:
        return config, settings
    folder = peft_folder(config.model.adapter)
    if folder.resolve() == config.output_dir.expanduser().resolve():
        raise ConfigError(
            f"model.adapter: the run would be written over {folder}, which it goes on from; set "
            "training_config.output_dir to another folder"
        )
    shape = _shape(usable_adapter(folder, config.model))
    problems, notes = _against(config.peft_config, shape, folder)
    if problems:
        raise ConfigError(problems)
    free = {key: settings.peft[key] for key in FREE if key in settings.peft}
    notes.append(f"model.adapter: training goes on from the adapter in {folder} (rank {shape.get('r', 8)})")
    settled = replace(
        settings,
        peft={**shape, **free},
        notes=[*settings.notes, *notes],
        auto=settings.auto - set(AUTO_PEFT),
    )
    return config.model_copy(update={"peft_config": {**shape, **free}}), settled


def _shape(lora: LoraConfig) -> dict[str, Any]:
    """The keys of an adapter's configuration that are not PEFT's defaults."""
    defaults = {
        field.name: field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        for field in dataclasses.fields(LoraConfig)
    }
    shape = {key: _listed(value) for key, value in vars(lora).items() if key in defaults and key not in LEFT_OUT}
    changed = {key: value for key, value in shape.items() if value != defaults[key] and value not in ({}, [])}
    return {**changed, "r": lora.r, "lora_alpha": lora.lora_alpha}


def _listed(value: Any) -> Any:
    return sorted(value) if isinstance(value, (set, frozenset)) else value


def _against(given: Mapping[str, Any], shape: Mapping[str, Any], folder: Path) -> tuple[list[str], list[str]]:
    """What `peft_config` asks for that the adapter has not, and a line for each key that has no effect."""
    problems, notes = [], []
    for key, value in given.items():
        if key in FREE or key in LEFT_OUT:
            continue
        own = shape.get(key, PEFT_DEFAULTS.get(key))
        if value in (None, AUTO) or _listed(value) == own or plain_name(value) == plain_name(own):
            continue
        if key in ("r", "lora_alpha"):
            problems.append(
                f"peft_config.{key} is {value}, and the adapter in {folder} has {own}; leave the key out, or "
                f"merge it first for a new one on top: phinetune merge {folder} --out MERGED, then model.path: MERGED"
            )
        else:
            notes.append(f"peft_config: `{key}` has no effect: training goes on from an adapter, which has its own")
    return problems, notes


def load_start(model: PeftModel, folder: Path) -> None:
    """Give an adapter that was just made the weights of the adapter in `folder`, which has the same shape.

    Raises:
        ModelError: they do not fit.
    """
    found: Any = set_peft_model_state_dict(model, load_file(folder / ADAPTER_WEIGHTS), adapter_name="default")
    missing = [name for name in found.missing_keys if "lora_" in name]
    if missing or found.unexpected_keys:
        named = ", ".join([*missing, *found.unexpected_keys][:4])
        raise ModelError(f"{folder / ADAPTER_WEIGHTS}: does not fit the new adapter ({named})")
    logger.info("the adapter begins with the weights in %s", folder)


@contextmanager
def at_start(model: PeftModel, folder: Path) -> Iterator[PeftModel]:
    """The model with the weights of the adapter in `folder`, which has its shape, while the context lasts."""
    kept = {name: tensor.clone() for name, tensor in get_peft_model_state_dict(model).items()}
    try:
        load_start(model, folder)
        yield model
    finally:
        set_peft_model_state_dict(model, kept)


def start_side(model: Any, recorded: Mapping[str, str] | None) -> Callable[[], AbstractContextManager[Any]] | None:
    """How to get a run's model as the run started with it; None for a run that began with a new adapter.

    It is None, too, if the adapter that it went on from is not there as it was; a line says so.

    Args:
        recorded: what `started_from` gave when the run started.
    """
    folder = _still_there(recorded) if recorded else None
    return partial(at_start, model, folder) if folder else None


def _still_there(recorded: Mapping[str, str]) -> Path | None:
    folder = Path(recorded["adapter"])
    try:
        if file_digest(folder / ADAPTER_WEIGHTS) == recorded["sha256"]:
            return folder
        why = "has changed since"
    except OSError:
        why = "is not there any more"
    logger.warning("the adapter that the run went on from, %s, %s, so it is not compared with", folder, why)
    return None


def start_digest(section: ModelSection) -> str | None:
    """SHA-256 of the weights and the configuration that a run goes on from; None for a new adapter."""
    if section.adapter is None:
        return None
    folder = peft_folder(section.adapter)
    both = file_digest(folder / ADAPTER_WEIGHTS) + file_digest(folder / ADAPTER_CONFIG)
    return hashlib.sha256(both.encode()).hexdigest()


def started_from(section: ModelSection) -> dict[str, str] | None:
    """The adapter that a run goes on from, as base.json and start.json hold it; None for a new adapter."""
    if section.adapter is None:
        return None
    folder = peft_folder(section.adapter).resolve()
    return {"adapter": str(folder), "sha256": file_digest(folder / ADAPTER_WEIGHTS)}
