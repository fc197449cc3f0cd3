"""Root-mean-square norm (RMSNorm, arXiv 1910.07467) with its own backward, which keeps little memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from phinetune.engine.kernels.chunks import row_chunks
from phinetune.engine.kernels.compiled import compiled


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, compile: bool = False) -> Tensor:
    """`weight · x / √(mean(x²) + eps)` over the last dimension.

    As in transformers, the mean square is computed in float32, and the normalised x is rounded to x's dtype before it
    is multiplied by the weight.

    Args:
        x: shape (..., width).
        weight: shape (width).
        compile: whether forward and backward are compiled.

    Returns:
        shape (..., width).
    """
    out: Tensor = _RMSNorm.apply(x, weight, eps, compile)  # type: ignore[no-untyped-call]
    return out


class _RMSNorm(torch.autograd.Function):
    """Keeps x, the weight and one float32 number per token for the backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, compile: bool) -> Tensor:
        ctx.compile = compile
        out: Tensor
        if compile:
            out, scale = compiled(_forward)(x, weight, eps)
        else:
            out, scale = torch.empty_like(x), x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)
            for rows in row_chunks(x):
                out[rows], scale[rows] = _forward(x[rows], weight, eps)
        ctx.save_for_backward(x, weight, scale)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        d_weight = dx = None
        if ctx.needs_input_grad[1]:
            d_weight = (grad * (x * scale)).reshape(-1, len(weight)).sum(0).to(weight.dtype)
        if ctx.needs_input_grad[0] and ctx.compile:
            dx = compiled(_backward)(grad, x, weight, scale)
        elif ctx.needs_input_grad[0]:
            dx = torch.empty_like(x)
            for rows in row_chunks(x):
                dx[rows] = _backward(grad[rows], x[rows], weight, scale[rows])
        return dx, d_weight, None, None


def _forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The output, shape (..., width), and scale = 1 / √(mean(x²) + eps), shape (..., 1)."""
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    scale = (length.square() / x.shape[-1] + eps).rsqrt()
    return (x * scale).to(x.dtype) * weight, scale


def _backward(grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """dx = scale · (g − n · mean(g · n)), where n = x · scale and g = grad · weight."""
    g = (grad * weight).float()
    share = (g * x).sum(-1, keepdim=True) * scale.square() / x.shape[-1]
    return g.addcmul_(x.float(), share, value=-1).mul_(scale).to(x.dtype)
