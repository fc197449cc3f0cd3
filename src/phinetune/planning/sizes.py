"""How large a model and its adapter are, without a weight in memory: counted on torch's meta device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from peft import get_peft_model
from torch import nn
from transformers import Phi3Config, Phi3ForCausalLM

from phinetune.checkpoints.adapters import linear_layers, resolve_targets, trainable_parameters
from phinetune.training.settings import Settings, make_lora_config

NF4_BLOCK, NF4_NESTED = 64, 256  # weights that share a scale, and scales that share one (QLoRA, section 3)
NF4_TABLES = 4 * (16 + 256 + 1)  # bytes a layer: both code books and the scales' mean


@dataclass(frozen=True)
class Sizes:
    """What a run holds whatever its batch.

    Attributes:
        weights: bytes of the base.
        expanded: bytes of the largest weight that is expanded for its product (4 and 8 bits); 0 otherwise.
        trainable: parameters of the adapter.
        parameters: of base and adapter.
        width: bytes of an element that products take.
    """

    config: Phi3Config
    weights: int
    expanded: int
    trainable: int
    parameters: int
    width: int


def count_sizes(config: Phi3Config, quantization: str, settings: Settings, dtype: torch.dtype) -> Sizes:
    """The sizes of a model with the adapter of `settings` on it.

    Raises:
        ConfigError: the adapter fits nowhere on it.
    """
    with torch.device("meta"):
        model = Phi3ForCausalLM._from_config(config, dtype=dtype)
        linear = linear_layers(model)
        weights = sum(p.numel() * p.element_size() for p in model.parameters())
        expanded = 0
        if quantization != "none":
            held = {name: quantized_bytes(layer, quantization) for name, layer in linear.items()}
            weights += sum(held.values()) - sum(layer.weight.nbytes for layer in linear.values())
            expanded = max(layer.weight.nbytes for layer in linear.values())
        base = trainable_parameters(model)[1]
        lora = make_lora_config(settings, resolve_targets(model, settings.peft.get("target_modules")))
        lora.init_lora_weights = False  # how the adapter begins does not change its size
        trainable = trainable_parameters(get_peft_model(model, lora))[0]
    return Sizes(config, weights, expanded, trainable, base + trainable, dtype.itemsize)


def quantized_bytes(layer: nn.Linear, quantization: str) -> int:
    """Bytes of a linear layer's weight as bitsandbytes holds it."""
    count = layer.weight.numel()
    if quantization == "int8":
        return count + 4 * layer.out_features  # a float32 scale a row
    blocks = -(-count // NF4_BLOCK)
    return -(-count // 2) + blocks + 4 * -(-blocks // NF4_NESTED) + NF4_TABLES
