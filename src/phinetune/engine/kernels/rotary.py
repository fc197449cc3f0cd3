"""Rotary position embedding (Su et al. 2021, RoFormer, section 3.2), in place.

It rotates all features of a head, or only the first of them (partial rotary).
"""

from __future__ import annotations

import torch
from torch import Tensor

from phinetune.engine.kernels.chunks import row_chunks
from phinetune.engine.kernels.native.operator import Operator, drawn


def rotate_(states: Tensor, cos: Tensor, sin: Tensor, *, back: bool = False) -> Tensor:
    """Rotate the first 2·m features of every head in place, as transformers' `apply_rotary_pos_emb` does.

    Args:
        states: queries or keys, shape (tokens, heads, features), any strides.
        cos, sin: shape (tokens, m). They are scaled already where longrope has an attention factor.
        back: whether to apply the transposed rotation, which the backward needs.

    Returns:
        `states` itself.
    """
    cos, sin = cos.to(states.dtype), sin.to(states.dtype)
    has_gaps = states.stride(-1) != 1 or cos.stride(-1) != 1 or sin.stride(-1) != 1  # then it can't be read as vectors
    (_by_torch if has_gaps else _rotate_)(states, cos, sin, -1.0 if back else 1.0)
    return states


def _by_torch(states: Tensor, cos: Tensor, sin: Tensor, sign: float) -> None:
    """Rotate `states` in place, by the angles or, if the sign is -1, by their opposites."""
    half = cos.shape[-1]
    for rows in row_chunks(states):
        c, s = cos[rows, None], sin[rows, None]
        first, second = states[rows, :, :half], states[rows, :, half : 2 * half]
        first_sin = first * s
        first.mul_(c).addcmul_(second, s, value=-sign)
        second.mul_(c).add_(first_sin, alpha=sign)


def _sample(kind: torch.dtype) -> tuple[Tensor | float, ...]:
    states, cos, sin = drawn((256, 12, 96), (256, 48), (256, 48), kind=kind)
    return states, cos, sin, 1.0


_rotate_ = Operator("rotate_", _by_torch, _sample)


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
