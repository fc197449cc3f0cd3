"""What differs in a GGUF where q, k, v and gate, up are layers of their own: Llama, Mistral and Qwen2.

llama.cpp has Mistral as its `llama`, too. Its `llama` rotates neighbouring features, where transformers rotates each
with the one half a head further; so rows of q and k stand in another order in the file. Its `qwen2` rotates as
transformers does.
"""

from __future__ import annotations

from typing import Any

import gguf
import numpy as np
import torch
from numpy.typing import NDArray
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from phinetune.engine.families import ModelConfig
from phinetune.exporting.longrope import rope

ARCHITECTURES = {
    "phi3": gguf.MODEL_ARCH.PHI3,
    "llama": gguf.MODEL_ARCH.LLAMA,
    "mistral": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
}
ROPES = ("default", "llama3")  # kinds of rotary embedding whose numbers were compared with llama.cpp's


def architecture(config: ModelConfig) -> str:
    """llama.cpp's name of a model's architecture."""
    return gguf.MODEL_ARCH_NAMES[ARCHITECTURES[config.model_type]]


def not_held(config: ModelConfig) -> list[str]:
    """What of a split model llama.cpp would compute in another way."""
    problems = []
    kind = rope(config).get("rope_type", "default")
    if kind not in ROPES:
        problems.append(f"rope type {kind} is not exported for {config.model_type}, only {' and '.join(ROPES)}")
    if config.model_type == "qwen2" and window(config):
        problems.append("llama.cpp's qwen2 has no sliding window")
    return problems


def window(config: ModelConfig) -> int | None:
    """How many keys a query sees, where that is fewer than the model has positions for; else None."""
    found = getattr(config, "sliding_window", None) if config.model_type in ("mistral", "qwen2") else None
    return int(found) if found and found < config.max_position_embeddings else None


def head_size(config: ModelConfig) -> int:
    """Features of a head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def add_keys(writer: gguf.GGUFWriter, config: ModelConfig) -> None:
    """The keys that llama.cpp's converter writes for this architecture, beyond those of every model."""
    size = head_size(config)
    if size * config.num_attention_heads != config.hidden_size:
        writer.add_key_length(size)
        writer.add_value_length(size)
    if config.model_type != "qwen2":
        writer.add_vocab_size(config.vocab_size)
    writer.add_rope_dimension_count(size)


def frequency_factors(config: ModelConfig) -> NDArray[Any] | None:
    """What each frequency is divided by (Llama 3.1's scaling), shape (size of a head / 2); None without it."""
    if rope(config).get("rope_type") != "llama3":
        return None
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    size = head_size(config)
    plain = 1.0 / float(rope(config)["rope_theta"]) ** (torch.arange(0, size, 2, dtype=torch.float64) / size)
    return (plain / scaled.double()).to(torch.float32).numpy()


def in_file_order(name: str, numbers: NDArray[Any], config: ModelConfig) -> NDArray[Any]:
    """The rows of a tensor, or of the B of its adapter, in the order in which llama.cpp has them.

    Args:
        name: transformers' name of the weight or the bias.
        numbers: shape (rows, …).
    """
    layer = name.rpartition(".")[0].rpartition(".")[2]
    if ARCHITECTURES[config.model_type] != gguf.MODEL_ARCH.LLAMA or layer not in ("q_proj", "k_proj"):
        return numbers
    heads = config.num_attention_heads if layer == "q_proj" else config.num_key_value_heads
    parts = numbers.reshape(heads or config.num_attention_heads, 2, -1, *numbers.shape[1:])
    return np.ascontiguousarray(parts.swapaxes(1, 2)).reshape(numbers.shape)
