"""The rotary embedding of a configuration, and LongRoPE's numbers as other programs want them told."""

from __future__ import annotations

import math
from typing import Any

from transformers import Phi3Config


def rope(config: Phi3Config) -> dict[str, Any]:
    """The keys of `rope_parameters`."""
    return dict(config.rope_parameters or {})


def is_longrope(config: Phi3Config) -> bool:
    """Whether there are short and long factors."""
    return bool(rope(config).get("rope_type") == "longrope")


def original_context(config: Phi3Config) -> int:
    """Tokens that the model had positions for before LongRoPE: up to here the short factors hold."""
    return int(rope(config).get("original_max_position_embeddings") or config.original_max_position_embeddings)


def trained_context(config: Phi3Config) -> int:
    """Tokens up to which LongRoPE takes its short factors; without LongRoPE, all that the model has positions for."""
    longest = int(config.max_position_embeddings)
    return min(longest, original_context(config)) if is_longrope(config) else longest


def attention_factor(config: Phi3Config) -> float:
    """What LongRoPE multiplies cosines and sines with: the configuration's own, or its authors' formula."""
    keys = rope(config)
    if keys.get("attention_factor") is not None:
        return float(keys["attention_factor"])
    original = original_context(config)
    scale = keys.get("factor") or config.max_position_embeddings / original
    return math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0
