"""The models of the Phi-3 family by their shapes, and what the planner says of a run on each. No weights are loaded."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch

from phinetune.checkpoints.random_shapes import parse_shape
from phinetune.engine.activation_memory import Level
from phinetune.planning.memory import MicroBatch, Parts, predict
from phinetune.planning.sizes import Sizes, count_sizes
from phinetune.training.settings import read_settings

GIB = 2**30
RANK = 16


class Model(NamedTuple):
    """A shape of the family.

    Attributes:
        name: as people call the checkpoints of this shape.
        path: the `model.path` of random weights of this shape, for a plan of one's own.
        hub: the checkpoints on the hub.
    """

    name: str
    path: str
    hub: tuple[str, ...]


# Phi-4 mini's sizes are those of its config.json on the hub; the others are presets of `random_shapes`.
PHI_4_MINI = (
    "random:{heads: 24, kv_heads: 8, vocab: 200064, tie_word_embeddings: true, max_position_embeddings: 131072, "
    "rope_parameters: {rope_type: default, rope_theta: 10000.0, partial_rotary_factor: 0.75}}"
)
FAMILY = (
    Model(
        "Phi-3 mini, Phi-3.5 mini",
        "random:phi-3-mini",
        (
            "microsoft/Phi-3-mini-4k-instruct",
            "microsoft/Phi-3-mini-128k-instruct",
            "microsoft/Phi-3.5-mini-instruct",
        ),
    ),
    Model("Phi-4 mini", PHI_4_MINI, ("microsoft/Phi-4-mini-instruct",)),
    Model(
        "Phi-3 medium",
        "random:phi-3-medium",
        ("microsoft/Phi-3-medium-4k-instruct", "microsoft/Phi-3-medium-128k-instruct"),
    ),
    Model("Phi-4", "random:phi-4", ("microsoft/phi-4",)),
)
METHODS = {"LoRA": "none", "QLoRA": "nf4"}  # and `model.quantization` of each


@cache
def sizes(model: Model, quantization: str = "none", rank: int = RANK) -> Sizes:
    """The sizes of a model in bfloat16 with an adapter of this rank on all of the decoder's linear layers."""
    settings = read_settings({"r": rank, "lora_alpha": 2 * rank, "target_modules": "all-linear"}, {})
    return count_sizes(parse_shape(model.path), quantization, settings, torch.bfloat16)


def need(model: Model, quantization: str, tokens: int, setting: str, free: int) -> tuple[Parts, list[Level]]:
    """The peak of a step of `tokens`, all of them trained on, with AdamW.

    Args:
        setting: engine.activation_memory.
        free: bytes that the run may take.
    """
    step = MicroBatch(tokens, tokens)
    return predict(sizes(model, quantization), step, setting, False, "adamw_torch", free)
