"""Rotary position embedding (Su et al. 2021, RoFormer, section 3.2) in place, whole or partial."""

from __future__ import annotations

import torch
from torch import Tensor

from phinetune.engine.kernels.chunks import parts


def rotate_(states: Tensor, cos: Tensor, sin: Tensor, *, back: bool = False) -> Tensor:
    """Rotate the first 2·m features of every head in place, as transformers' `apply_rotary_pos_emb` does.

    Args:
        states: queries or keys, shape (tokens, heads, features), any strides.
        cos, sin: shape (tokens, m); scaled by longrope's attention factor where there is one.
        back: apply the transposed rotation, which the backward needs.
    """
    cos, sin = cos[:, None].to(states.dtype), sin[:, None].to(states.dtype)
    for part in parts(states):
        _rotate_(states[part], cos[part], sin[part], -1.0 if back else 1.0)
    return states


def _rotate_(states: Tensor, cos: Tensor, sin: Tensor, sign: float) -> None:
    half = cos.shape[-1]
    first, second = states[..., :half], states[..., half : 2 * half]
    kept = first * sin
    first.mul_(cos).addcmul_(second, sin, value=-sign)
    second.mul_(cos).add_(kept, alpha=sign)


def tables(inv_freq: Tensor, positions: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """cos and sin, each (tokens, m), in float32 of `positions` (tokens) at the frequencies `inv_freq` (m)."""
    angles = positions.to(torch.float32)[:, None] * inv_freq.to(positions.device, torch.float32)
    return angles.cos() * scaling, angles.sin() * scaling
