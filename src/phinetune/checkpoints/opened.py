"""Opening what can answer: a run, an adapter folder, or a plain model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftModel

from phinetune.chat.encoder import ChatEncoder, make_encoder
from phinetune.checkpoints.adapters import ADAPTER_CONFIG, attach_adapter, read_adapter_config, read_base
from phinetune.checkpoints.load import Loaded, load_base
from phinetune.config.run import ModelSection, RunConfig, make_config
from phinetune.errors import ModelError
from phinetune.logs import quiet_libraries
from phinetune.run_folder import RunFolder


@dataclass(frozen=True)
class Tuned:
    """A run, an adapter folder or a plain model, ready to answer."""

    loaded: Loaded
    model: Any
    encoder: ChatEncoder
    config: RunConfig

    @property
    def is_tuned(self) -> bool:
        return isinstance(self.model, PeftModel)


def open_model(path: str | Path, **model_options: Any) -> Tuned:
    """A run, an adapter folder, or anything `model.path` takes, with the data settings it was trained with.

    Args:
        model_options: keys of the section `model` that replace the recorded ones (`device`, `dtype`, …).

    Raises:
        ModelError: nothing there that is one of these, or an adapter for another base.
    """
    quiet_libraries()
    folder = Path(path).expanduser()
    adapted = (folder / ADAPTER_CONFIG).is_file()
    config = recorded_config(folder) if adapted else make_config({"model": {"path": str(path)}})
    merged = {**config.model.model_dump(), **model_options}
    section = make_config({"model": merged}).model
    loaded = load_base(section, fast=config.engine.kind == "fast")
    encoder = make_encoder(loaded.tokenizer, config.data.loss_on, config.data.system)
    model = attach_adapter(loaded, folder) if adapted else loaded.model
    return Tuned(loaded, model, encoder, config)


def recorded_config(folder: Path) -> RunConfig:
    """The run's configuration; for a checkpoint that of its run; for another tool's adapter just its base."""
    for place in (folder, folder.parent):
        if RunFolder(place).is_run:
            return RunFolder(place).read_config()
    base = read_base(folder)
    if base:
        return make_config({"model": ModelSection(path=base.path, revision=base.revision).model_dump()})
    name = read_adapter_config(folder).base_model_name_or_path
    if not name:
        raise ModelError(f"{folder / ADAPTER_CONFIG}: names no base model (base_model_name_or_path)")
    return make_config({"model": {"path": name}})
