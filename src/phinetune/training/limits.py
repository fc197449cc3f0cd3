"""Replaces settings that this model or this device can't follow, each with a note for the log."""

from __future__ import annotations

from dataclasses import replace

import torch

from phinetune.engine.families import ModelConfig
from phinetune.training.settings import Settings


def limit_length(settings: Settings, shape: ModelConfig) -> Settings:
    """The settings with a `max_length` that the model has positions for.

    Beyond them a model was never trained, and it can't answer there either.
    """
    given, positions = settings.max_length, int(shape.max_position_embeddings)
    if given is not None and given <= positions:
        return settings
    note = (
        f"training_config.max_length: {'no limit' if given is None else given} is more than the model has positions "
        f"(max_position_embeddings: {positions}); {positions} in its place"
    )
    return replace(settings, training={**settings.training, "max_length": positions}, notes=[*settings.notes, note])


def without_fp16(settings: Settings, device: torch.device, dtype: torch.dtype) -> Settings:
    """The settings without `fp16` where the device is no CUDA device, and so has no autocast to float16 with scaling.

    Args:
        dtype: the weights', in which the run then computes.
    """
    if not settings.training.get("fp16") or device.type == "cuda":
        return settings
    name = str(dtype).removeprefix("torch.")
    note = f"training_config: `fp16` is for CUDA devices; on {device.type} the run trains in {name}, the weights' dtype"
    return replace(settings, training={**settings.training, "fp16": False}, notes=[*settings.notes, note])
