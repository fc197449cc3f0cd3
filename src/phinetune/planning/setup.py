"""A run as far as its memory goes, and the same run with other settings."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import Phi3Config
from trl import SFTConfig

from phinetune.checkpoints.device import pick_device, pick_dtype
from phinetune.config.run import RunConfig
from phinetune.engine.memory import Level
from phinetune.planning.memory import Parts, Step, optimizer_name, predict
from phinetune.planning.sizes import Sizes, count_sizes
from phinetune.planning.steps import Steps, count_steps
from phinetune.training.settings import Settings, make_training_args, read_settings


class Need(NamedTuple):
    """What a run takes: sizes of model and adapter, its steps, memory by part, and what each layer keeps."""

    sizes: Sizes
    steps: Steps
    memory: Parts
    levels: list[Level]


@dataclass(frozen=True)
class Setup:
    """A run before anything of it is loaded.

    Attributes:
        shape: the model's configuration.
        lengths: tokens of each row that a micro-batch is made of.
        share: of the tokens that are trained on.
        free: bytes of memory that the run may take.
    """

    config: RunConfig
    settings: Settings
    args: SFTConfig
    dtype: torch.dtype
    shape: Phi3Config
    lengths: np.ndarray[Any, Any]
    share: float
    free: int

    def need(self) -> Need:
        """What the run takes on the fast engine."""
        sizes = count_sizes(self.shape, self.config.model.quantization, self.settings, self.dtype)
        steps = count_steps(self.lengths, self.args, self.config.data.streaming)
        step = Step(steps.largest, max(1, round(steps.largest * self.share)))
        setting, dropout = self.config.engine.activation_memory, bool(self.settings.peft.get("lora_dropout"))
        return Need(sizes, steps, *predict(sizes, step, setting, dropout, optimizer_name(self.args), self.free))

    def changed(self, changes: dict[str, Any]) -> Setup:
        """The run after changes of keys such as `training_config.max_length`; longer rows are taken as cut to it."""
        tree = self.config.model_dump()
        for key, value in changes.items():
            section, name = key.split(".")
            tree[section][name] = value
        if "training_config.max_length" in changes:
            tree["training_config"].pop("max_seq_length", None)  # its older name
        config = RunConfig.model_validate(tree)
        settings = read_settings(config.peft_config, config.training_config)
        device = pick_device(config.model.device)
        dtype = pick_dtype(config.model.dtype, device)
        args = make_training_args(settings, config.output_dir, device, dtype, fast=True)
        longest = settings.max_length
        lengths = self.lengths if longest is None else np.minimum(self.lengths, longest)
        return replace(self, config=config, settings=settings, args=args, dtype=dtype, lengths=lengths)
