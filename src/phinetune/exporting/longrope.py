"""The rotary embedding in a configuration, and the numbers of LongRoPE that other programs need."""

from __future__ import annotations

import math
from typing import Any

from phinetune.engine.families import ModelConfig


def rope(config: ModelConfig) -> dict[str, Any]:
    """The configuration's `rope_parameters`."""
    return dict(config.rope_parameters or {})


def is_longrope(config: ModelConfig) -> bool:
    """Whether the rotary embedding is LongRoPE, which has short and long factors."""
    return bool(rope(config).get("rope_type") == "longrope")


def original_context(config: ModelConfig) -> int:
    """Tokens that the model had positions for before LongRoPE. Up to this length LongRoPE uses its short factors."""
    return int(rope(config).get("original_max_position_embeddings") or config.original_max_position_embeddings)


def trained_context(config: ModelConfig) -> int:
    """With LongRoPE, the tokens up to which it uses its short factors. Without it, all positions of the model."""
    longest = int(config.max_position_embeddings)
    return min(longest, original_context(config)) if is_longrope(config) else longest


def attention_factor(config: ModelConfig) -> float:
    """The factor by which LongRoPE multiplies cosines and sines.

    It is the configuration's own, or else it follows from the formula of LongRoPE's authors.
    """
    keys = rope(config)
    if keys.get("attention_factor") is not None:
        return float(keys["attention_factor"])
    original = original_context(config)
    scale = keys.get("factor") or config.max_position_embeddings / original
    return math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0
