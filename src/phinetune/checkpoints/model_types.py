"""Which kinds of models are taken, and what to use for the others."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from phinetune.engine.families import CONFIGS, ModelConfig
from phinetune.errors import ModelError

TAKEN = (
    "phi3 (Phi-3, Phi-3.5, Phi-4 and Phi-4 mini), and of the same layers llama, mistral and qwen2 (Phi-3 in the form "
    "that unsloth has; Llama, TinyLlama, SmolLM2, Mistral, Qwen2)"
)
# What the model types of other kinds hold, and who trains these.
OTHERS = (
    (
        r"moe|mixtral|deepseek|dbrx|jamba|jetmoe|gpt_oss",
        "this is a mixture of experts; ms-swift, LLaMA-Factory and axolotl train these",
    ),
    (
        r"phi3_v|phi4mm|phi4_multimodal|llava|_vl|vision|mllama|idefics|paligemma|pixtral|mistral3|internvl|llama4",
        "this model reads images (or sound); ms-swift and LLaMA-Factory train these",
    ),
    (r"^phi$|phi-msft|mixformer", "this is Phi-1.5 or Phi-2, which has other layers; PEFT and TRL train it"),
)


def config_class(tree: Mapping[str, Any], file: Path) -> type[ModelConfig]:
    """transformers' class for a model's configuration.

    Args:
        tree: the content of config.json.
        file: config.json, for the error message.

    Raises:
        ModelError: the model is of a kind that is not taken.
    """
    model_type = tree.get("model_type")
    kind = CONFIGS.get(model_type) if isinstance(model_type, str) else None
    if kind is None:
        other = next((words for sign, words in OTHERS if re.search(sign, str(model_type))), "")
        hint = f"; {other}" if other else ""
        raise ModelError(f"{file}: model_type is `{model_type}`; taken are {TAKEN}{hint}")
    return kind
