"""Counts how large a model and its adapter are, on torch's meta device, where weights take no memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from phinetune.checkpoints.prequantized import is_double, is_held_so
from phinetune.checkpoints.target_modules import linear_layers, trainable_parameters
from phinetune.engine.families import ModelConfig, plain_model
from phinetune.training.rehearsal import adapted_shape
from phinetune.training.settings import Settings

NF4_BLOCK, NF4_NESTED = 64, 256  # weights that share a scale, and scales that share a second one (QLoRA, section 3)
NF4_CODES = 16
NF4_TABLES = 4 * (NF4_CODES + 256 + 1)  # bytes per layer: two code books and the mean of the scales


@dataclass(frozen=True)
class Sizes:
    """The sizes that do not depend on a run's batches.

    Attributes:
        config: the model's configuration.
        weights: bytes of the base's weights.
        expanded: bytes of the largest weight that is expanded for its product (4 and 8 bits); 0 without quantisation.
        trainable: how many parameters the adapter has.
        parameters: how many parameters base and adapter have together.
        width: bytes per element of the products' dtype.
    """

    config: ModelConfig
    weights: int
    expanded: int
    trainable: int
    parameters: int
    width: int


def count_sizes(config: ModelConfig, quantization: str, settings: Settings, dtype: torch.dtype) -> Sizes:
    """The sizes of a model with the adapter of `settings` on it.

    Args:
        quantization: how the base is held (`held_as`).

    Raises:
        ConfigError: the adapter matches no layer of the model.
    """
    with torch.device("meta"):
        model = plain_model(config, dtype=dtype)
    linear = {name: layer for name, layer in linear_layers(model).items() if is_held_so(name, config)}
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    expanded = 0
    if quantization != "none" and linear:
        quantized = sum(quantized_bytes(layer, quantization, is_double(config)) for layer in linear.values())
        weights += quantized - sum(layer.weight.nbytes for layer in linear.values())
        expanded = max(layer.weight.nbytes for layer in linear.values())
    base = trainable_parameters(model)[1]
    trainable = trainable_parameters(adapted_shape(settings, config, dtype))[0]
    return Sizes(config, weights, expanded, trainable, base + trainable, dtype.itemsize)


def quantized_bytes(layer: nn.Linear, quantization: str, double: bool = True) -> int:
    """Bytes of a linear layer's weight in bitsandbytes' form.

    Args:
        double: whether the scales of nf4 are quantised, too.
    """
    count = layer.weight.numel()
    if quantization == "int8":
        return count + 4 * layer.out_features  # one float32 scale for each row
    blocks = -(-count // NF4_BLOCK)
    if not double:
        return -(-count // 2) + 4 * (blocks + NF4_CODES)
    return -(-count // 2) + blocks + 4 * -(-blocks // NF4_NESTED) + NF4_TABLES
