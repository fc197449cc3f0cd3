"""Rotary position embedding (Su et al. 2021, RoFormer, section 3.2), in place.

It rotates all features of a head, or only the first of them (partial rotary).
"""

from __future__ import annotations

import torch
from torch import Tensor

from phinetune.engine.kernels.chunks import row_chunks


def rotate_(states: Tensor, cos: Tensor, sin: Tensor, *, back: bool = False) -> Tensor:
    """Rotate the first 2·m features of every head in place, as transformers' `apply_rotary_pos_emb` does.

    Args:
        states: queries or keys, shape (tokens, heads, features), any strides.
        cos, sin: shape (tokens, m). They are scaled already where longrope has an attention factor.
        back: whether to apply the transposed rotation, which the backward needs.

    Returns:
        `states` itself.
    """
    cos, sin = cos[:, None].to(states.dtype), sin[:, None].to(states.dtype)
    for rows in row_chunks(states):
        _rotate_(states[rows], cos[rows], sin[rows], -1.0 if back else 1.0)
    return states


def _rotate_(states: Tensor, cos: Tensor, sin: Tensor, sign: float) -> None:
    half = cos.shape[-1]
    first, second = states[..., :half], states[..., half : 2 * half]
    first_sin = first * sin
    first.mul_(cos).addcmul_(second, sin, value=-sign)
    second.mul_(cos).add_(first_sin, alpha=sign)


def tables(inv_freq: Tensor, positions: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """The cosines and sines of the rotation angles.

    Args:
        inv_freq: the frequencies, shape (m), in radians per position.
        positions: shape (tokens).
        scaling: a factor for both tables, longrope's attention factor or 1.

    Returns:
        cos and sin, each of shape (tokens, m) and float32.
    """
    angles = positions.to(torch.float32)[:, None] * inv_freq.to(positions.device, torch.float32)
    return angles.cos() * scaling, angles.sin() * scaling
