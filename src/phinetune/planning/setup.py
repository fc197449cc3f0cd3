"""What decides how much memory a run takes, and the same run with other settings."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from trl import SFTConfig

from phinetune.checkpoints.device import pick_device, pick_dtype
from phinetune.checkpoints.prequantized import held_as
from phinetune.config.run import RunConfig
from phinetune.engine.activation_memory import Level
from phinetune.engine.device_memory import free_bytes
from phinetune.engine.even_rows import added
from phinetune.engine.families import ModelConfig
from phinetune.engine.kept_memory import keeps_memory
from phinetune.planning.memory import MicroBatch, Parts, optimizer_name, predict
from phinetune.planning.sizes import Sizes, count_sizes
from phinetune.training.objectives.objective import Objective
from phinetune.training.prepare import PreparedRun
from phinetune.training.settings import Settings, make_training_args, read_settings
from phinetune.training.steps import Steps, count_steps


class Need(NamedTuple):
    """What a run takes: the sizes of model and adapter, the steps, the memory by part, and what each layer keeps."""

    sizes: Sizes
    steps: Steps
    memory: Parts
    levels: list[Level]


@dataclass(frozen=True)
class Setup:
    """A run whose model is not loaded.

    Attributes:
        shape: the model's configuration.
        lengths: the number of tokens of each row that micro-batches are made of, shape (rows).
        share: the share of tokens that are trained on.
        free: bytes of memory that the run may take.
    """

    config: RunConfig
    settings: Settings
    objective: Objective
    args: SFTConfig
    dtype: torch.dtype
    shape: ModelConfig
    lengths: np.ndarray[Any, Any]
    share: float
    free: int

    @classmethod
    def of(cls, prepared: PreparedRun) -> Setup:
        """The setup of a prepared run, with the memory that is free now."""
        counts = prepared.chats.train.report
        return cls(
            prepared.config,
            prepared.settings,
            prepared.objective,
            prepared.args,
            prepared.dtype,
            prepared.shape,
            prepared.lengths,
            counts.trainable_tokens / max(1, counts.tokens),
            free_bytes(prepared.device),
        )

    def need(self) -> Need:
        """What the run takes with the fast engine."""
        sizes = count_sizes(self.shape, held_as(self.config.model, self.shape), self.settings, self.dtype)
        steps = count_steps(self.lengths, self.args, self.config.data.streaming)
        setting, dropout = self.config.engine.activation_memory, bool(self.settings.peft.get("lora_dropout"))
        device, name = pick_device(self.config.model.device), optimizer_name(self.args)
        largest, labels = steps.largest, self.objective.labels(steps.largest, self.share)
        more, more_labels = added(largest, labels, self.shape, torch.empty(0, dtype=self.dtype, device=device))
        batch = MicroBatch(largest + more, labels + more_labels)
        about = {"shared": device.type == "cpu", "keeps": keeps_memory(device)}
        return Need(sizes, steps, *predict(sizes, batch, setting, dropout, name, self.free, **about))

    def changed(self, changes: dict[str, Any]) -> Setup:
        """The run with other values for keys such as `training_config.max_length`. Longer rows count as cut to it.

        Raises:
            ConfigError: the values do not fit together.
        """
        tree = self.config.model_dump()
        for key, value in changes.items():
            section, name = key.split(".")
            tree[section][name] = value
        if "training_config.max_length" in changes:
            tree["training_config"].pop("max_seq_length", None)  # the older name of max_length
        config = RunConfig.model_validate(tree)
        settings = read_settings(config.peft_config, config.training_config)
        device = pick_device(config.model.device)
        dtype = pick_dtype(config.model.dtype, device)
        args = make_training_args(settings, config.output_dir, device, dtype, fast=True)
        longest = settings.max_length
        lengths = self.lengths if longest is None else np.minimum(self.lengths, longest)
        return replace(self, config=config, settings=settings, args=args, dtype=dtype, lengths=lengths)
