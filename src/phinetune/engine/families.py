"""The families of models that are taken, by `model_type`: Phi-3, and those whose layers are Phi-3's with q, k, v and
gate, up apart.

A Llama is a Phi-3 of that form, and so are Mistral (sliding window) and Qwen2 (biases on q, k and v). Checkpoints that
write Phi-3 itself in this form are of `model_type` llama or mistral.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import transformers
from transformers import LlamaConfig, MistralConfig, Phi3Config, PreTrainedModel, Qwen2Config

ModelConfig: TypeAlias = Phi3Config | LlamaConfig | MistralConfig | Qwen2Config

CONFIGS: dict[str, type[ModelConfig]] = {
    "phi3": Phi3Config,
    "llama": LlamaConfig,
    "mistral": MistralConfig,
    "qwen2": Qwen2Config,
}
# How the names of transformers' classes begin.
NAMES = {"phi3": "Phi3", "llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2"}


@dataclass(frozen=True)
class InputNames:
    """The linear layers that read a half's input, in the order in which their outputs lie side by side.

    Attributes:
        attention: those of `self_attn`: queries, keys, values.
        mlp: those of `mlp`: gate, up.
    """

    attention: tuple[str, ...]
    mlp: tuple[str, ...]


FUSED = InputNames(("qkv_proj",), ("gate_up_proj",))
SPLIT = InputNames(("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def is_fused(config: Any) -> bool:
    """Whether q, k, v are one layer, and gate, up are one."""
    return bool(config.model_type == "phi3")


def input_names(config: Any) -> InputNames:
    """How a configuration's model names these layers."""
    return FUSED if is_fused(config) else SPLIT


def transformers_class(config: Any) -> type[PreTrainedModel]:
    """transformers' own class of a configuration's model with its output head."""
    kind: type[PreTrainedModel] = getattr(transformers, f"{NAMES[config.model_type]}ForCausalLM")
    return kind


def plain_model(config: Any, **options: Any) -> Any:
    """A new model of transformers' own class, with random weights or, on the device `meta`, with none.

    Args:
        options: of transformers' `_from_config`, such as the dtype.
    """
    return transformers_class(config)._from_config(config, **options)
