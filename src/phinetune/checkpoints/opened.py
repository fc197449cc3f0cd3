"""Opens a run, an adapter folder, or a model without an adapter, so that it can answer."""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel

from phinetune.chats.encoder import ChatEncoder, make_encoder
from phinetune.chats.tagged_text import tags_of
from phinetune.checkpoints.adapter_fit import ADAPTER_CONFIG
from phinetune.checkpoints.adapters import attach_adapter, read_adapter_config, read_base, usable_adapter
from phinetune.checkpoints.foreign_adapters import peft_folder, sixteen_bit_base
from phinetune.checkpoints.load import Loaded, load_base
from phinetune.checkpoints.small_files import what_to_do
from phinetune.checkpoints.untouched import base_again, untouched_base
from phinetune.config.answer_weights import Q8
from phinetune.config.model import ModelSection
from phinetune.config.run import RunConfig, make_config
from phinetune.engine.peft_variants import moves_the_base, not_converted
from phinetune.errors import ConfigError, ModelError
from phinetune.logs import quiet_libraries
from phinetune.run_folder import CONFIG, RunFolder

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Opened:
    """A run, an adapter folder or a model, ready to answer."""

    loaded: Loaded
    model: Any
    encoder: ChatEncoder
    config: RunConfig

    @property
    def has_adapter(self) -> bool:
        """Whether there is a tuned model beside the base."""
        return isinstance(self.model, PeftModel)

    def base_side(self) -> AbstractContextManager[Any]:
        """A context that gives the base: see `untouched_base`."""
        return untouched_base(self.model, self.loaded, self.config.model)

    def base_again(self) -> Any | None:
        """The base in memory of its own, where one is needed: see `phinetune.checkpoints.untouched.base_again`."""
        return base_again(self.model, self.loaded, self.config.model)


def open_model(
    path: str | Path, config: RunConfig | None = None, *, weights: str | None = None, **model_options: Any
) -> Opened:
    """Open a run, an adapter folder, or anything that `model.path` takes.

    A run keeps the data settings that it was trained with.

    Args:
        config: what `opened_config` returned for `path`. None: it is read now.
        weights: see `load_base`. For an adapter that does more than add to its base, `auto` leaves the base as it is.
        model_options: keys of the section `model` that replace the recorded ones (`device`, `dtype`, …).

    Raises:
        ModelError: `path` is none of these, or its adapter belongs to another base.
        ConfigError: the base can't lie as `weights` says.
    """
    quiet_libraries()
    config = config or opened_config(path, **model_options)
    folder = peft_folder(path)
    # An adapter that can't be used is told before the base is loaded.
    adapter = usable_adapter(folder, config.model) if is_adapter(folder) else None
    is_fast = config.engine.kind == "fast"
    if weights == Q8 and not _only_adds(adapter):
        raise ConfigError([f"weights: q8_0: {folder}: this adapter does more than add to its base; leave it out"])
    weights = weights if weights == Q8 or (is_fast and _only_adds(adapter)) else None
    if weights == Q8 and adapter:
        adapter.init_lora_weights = True  # the file has A and B; some beginnings would first ask the weight for them
    loaded = load_base(config.model, fast=is_fast, weights=weights)
    data = config.data
    encoder = make_encoder(loaded.tokenizer, data.loss_on, data.system, tags_of(data))
    model = attach_adapter(loaded, folder, adapter) if adapter else loaded.model
    return Opened(loaded, model, encoder, config)


def _only_adds(adapter: LoraConfig | None) -> bool:
    """Whether the base's own weights are read and nothing else: s · B A is added to what they give."""
    return adapter is None or not (moves_the_base(vars(adapter)) or not_converted(vars(adapter)))


def opened_config(path: str | Path, **model_options: Any) -> RunConfig:
    """The configuration that `open_model` uses. No weights are loaded.

    Raises:
        ModelError: the adapter names no base.
        ConfigError: the section `model` does not take a key or a value.
    """
    folder = peft_folder(path)
    config = recorded_config(folder) if is_adapter(folder) else make_config({"model": {"path": str(path)}})
    section = make_config({"model": {**config.model.model_dump(), **model_options}}).model
    return config.model_copy(update={"model": section}, deep=True)


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter."""
    return (folder / ADAPTER_CONFIG).is_file()


def recorded_config(folder: Path) -> RunConfig:
    """The configuration that goes with an adapter folder.

    For a run and its checkpoints it is the run's. For an adapter of another tool it names the base and nothing else.

    Raises:
        ModelError: the adapter names no base.
    """
    run = run_of(folder)
    if run:
        return run.read_config()
    base = read_base(folder)
    if base and (folder / CONFIG).exists():  # phinetune wrote both; without the second its settings would be lost
        raise ModelError(
            f"{folder / CONFIG}: damaged: it does not begin as a run's configuration; {what_to_do(folder / CONFIG)}"
        )
    if base:
        return make_config({"model": ModelSection(path=base.path, revision=base.revision).model_dump()})
    name = read_adapter_config(folder).base_model_name_or_path
    if not name:
        raise ModelError(f"{folder / ADAPTER_CONFIG}: names no base model (base_model_name_or_path)")
    path, held = sixteen_bit_base(name)
    if held:
        logger.info("the base %s is %s in nf4, so that one is read and quantised", name, path)
    return make_config({"model": {"path": path, **held}})


def run_of(folder: Path) -> RunFolder | None:
    """The run in a folder, or the run that the checkpoint in this folder belongs to; None if there is none."""
    return next((RunFolder(place) for place in (folder, folder.parent) if RunFolder(place).is_run), None)
