"""Measures how long a step takes on this machine, with a real micro-batch and two layers of the model's real shape."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import yaml
from peft import get_peft_model
from torch import nn

from phinetune.checkpoints import random_shapes
from phinetune.checkpoints.load import load_base
from phinetune.checkpoints.prequantized import held_as
from phinetune.checkpoints.target_modules import matched_targets, trainable_parameters
from phinetune.config.model import ModelSection
from phinetune.engine.activation_memory import Level
from phinetune.engine.families import ModelConfig
from phinetune.engine.lora_layers import use_fused_layers
from phinetune.training.objectives.objective import Objective
from phinetune.training.prepare import PreparedRun
from phinetune.training.rehearsal import adapted_shape
from phinetune.training.settings import Settings, make_lora_config

ROUNDS = 3
LONG = 5.0  # seconds; after a counted round that takes longer, there are no more rounds


@dataclass(frozen=True)
class Speed:
    """Measured times in seconds.

    Attributes:
        tokens: how many tokens the measured micro-batch had.
        layer: the time of one layer's forward and backward, by what the layer keeps.
        rest: the time of everything but the layers: embedding, head and loss.
        a_parameter: the time that a step of the optimizer takes per parameter.
        forward: the time of one layer's forward, and of the forward of the rest.
    """

    tokens: int
    layer: dict[Level, float]
    rest: float
    a_parameter: float
    forward: tuple[float, float]

    def batch(self, levels: Sequence[Level], tokens: float) -> float:
        """The time in seconds of a micro-batch with this number of tokens.

        Args:
            levels: what each layer keeps.
        """
        return (self.rest + sum(self.layer[level] for level in levels)) * tokens / self.tokens

    def reading(self, layers: int, tokens: float) -> float:
        """The time in seconds of a forward alone for this number of tokens, as a reference or an evaluation is."""
        layer, rest = self.forward
        return (rest + layers * layer) * tokens / self.tokens


def measure(prepared: PreparedRun, rows: Sequence[dict[str, Any]], levels: Sequence[Level]) -> Speed:
    """Measure forward and backward of `rows` through one layer and through two. The difference is the time of a layer.

    Args:
        prepared: the run; it must train on the fast engine.
        rows: the rows of a micro-batch.
        levels: what the layers of the run keep.
    """
    settings, engine, objective = prepared.settings, prepared.engine.fast, prepared.objective
    assert engine
    loaded = load_base(two_layers(prepared.config.model, prepared.shape), fast=True)
    lora = make_lora_config(_for_every_layer(settings, prepared.shape), loaded.model)
    model: Any = get_peft_model(loaded.model, use_fused_layers(lora, loaded.model)).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.data = parameter.data.float()
    collate = engine.collator(loaded.model.config, owned=objective.owned, columns=objective.columns)
    arranged = objective.arranged(rows, len(rows), settings.max_length)
    rows = [{**dict.fromkeys(objective.reference, 0.0), **arranged[i]} for i in range(len(arranged))]
    batch = {key: value.to(loaded.device) for key, value in collate(rows).items()}
    engine.set_up(model, loaded.device)
    decoder = model.get_base_model().model
    both_layers = decoder.layers

    def step_seconds(levels: Sequence[Level]) -> float:
        decoder.layers = both_layers[: len(levels)]
        decoder.activation_levels = lambda tokens: levels
        return _seconds(lambda: _step(model, batch, objective, loaded.device))

    def forward_seconds(layers: int) -> float:
        decoder.layers = both_layers[:layers]
        return _seconds(lambda: _forward(model, batch, loaded.device))

    one_layer = step_seconds([Level.KEEP])
    # Beside other programs, two layers of a small model may take less time than one.
    layer = {level: max(0.0, step_seconds([level, Level.KEEP]) - one_layer) for level in sorted({Level.KEEP, *levels})}
    one, two = forward_seconds(1), forward_seconds(2)
    forward = (max(0.0, two - one), max(0.0, 2 * one - two))
    decoder.layers = both_layers
    rest = max(0.0, one_layer - layer[Level.KEEP])
    a_parameter = _optimizer(trained) / trainable_parameters(model)[0]
    return Speed(int(batch["row_tokens"]), layer, rest, a_parameter, forward)


# What names layers that two layers alone do not have, or counts over all of them.
BY_LAYER = ("layers_to_transform", "layers_pattern", "layer_replication", "rank_pattern", "alpha_pattern")


def _for_every_layer(settings: Settings, shape: ModelConfig) -> Settings:
    """The settings for a model that has an adapter in every layer, wherever the run's model has one in some."""
    names = [layer.name for layer in matched_targets(adapted_shape(settings, shape, torch.float32))]
    kept = {key: value for key, value in settings.peft.items() if key not in BY_LAYER}
    return replace(settings, peft=kept | {"target_modules": names, "init_lora_weights": True})


def two_layers(section: ModelSection, config: ModelConfig) -> ModelSection:
    """The section `model` for a model of this shape with two layers and random weights, held as that one is."""
    known = type(config)().to_dict()
    drop = ("architectures", "transformers_version", "dtype", "_name_or_path", "auto_map", "layer_types")
    sizes = {key: value for key, value in config.to_diff_dict().items() if key in known and key not in drop}
    shape = {**sizes, "model_type": config.model_type, "num_hidden_layers": 2}
    text = yaml.safe_dump(shape, default_flow_style=True, width=1 << 30).strip()
    held = {"quantization": held_as(section, config), "revision": None, "tokenizer": None}
    return section.model_copy(update={"path": random_shapes.PREFIX + text, **held})


def _step(model: nn.Module, batch: dict[str, Any], objective: Objective, device: torch.device) -> None:
    row = objective.loss(model, batch)
    (row.total / row.items).sum().backward()
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@torch.no_grad()
def _forward(model: nn.Module, batch: dict[str, Any], device: torch.device) -> None:
    """What a reference or an evaluation takes of a micro-batch."""
    model(**batch)
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _optimizer(trained: Sequence[nn.Parameter]) -> float:
    """Seconds of one step of AdamW with clipped gradients."""
    optimizer = torch.optim.AdamW(trained, lr=0.0)
    return _seconds(lambda: (nn.utils.clip_grad_norm_(trained, 1.0), optimizer.step()))


def _seconds(work: Callable[[], Any]) -> float:
    """The median time of a few rounds. The first round is never counted: the kernels may be compiled in it."""
    work()
    times: list[float] = []
    while len(times) < ROUNDS and max(times, default=0.0) <= LONG:
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times) if times[-1] <= LONG else times[-1]


def sample_batch(lengths: Sequence[int] | np.ndarray[Any, Any], batch: int) -> list[int]:
    """The places of `batch` rows that together have about as many tokens as a mean micro-batch."""
    mean = float(np.mean(lengths)) * min(batch, len(lengths))
    draws = [np.random.default_rng(seed).permutation(len(lengths))[:batch] for seed in range(64)]
    best = min(draws, key=lambda places: abs(float(np.asarray(lengths)[places].sum()) - mean))
    return [int(place) for place in best]
