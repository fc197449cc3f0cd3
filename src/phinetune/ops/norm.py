"""Root-mean-square norm (Zhang and Sennrich 2019) with a small backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`weight · x / √(mean(x²) + eps)` over the last dimension.

    The statistics are float32 and the normalised x is rounded to x's dtype before it is weighed, as in transformers.

    Args:
        x: shape (..., width).
        weight: shape (width).
    """
    out: Tensor = _RMSNorm.apply(x, weight, eps)  # type: ignore[no-untyped-call]
    return out


class _RMSNorm(torch.autograd.Function):
    """Keeps x and one float32 number a token."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        scale = (length.square() / x.shape[-1] + eps).rsqrt()
        ctx.save_for_backward(x, weight, scale)
        normed: Tensor = (x * scale).to(x.dtype) * weight
        return normed

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        # With n = x·scale and g = grad·weight: dx = scale · (g − n · mean(g·n))
        d_weight = dx = None
        if ctx.needs_input_grad[1]:
            d_weight = (grad * (x * scale)).flatten(0, -2).sum(0).to(weight.dtype)
        if ctx.needs_input_grad[0]:
            g = grad * weight
            pull = torch.linalg.vecdot(g.float(), x.float()).unsqueeze(-1) * scale.square() / x.shape[-1]
            dx = (g - x * pull).mul_(scale).to(x.dtype)
        return dx, d_weight, None
