"""Root-mean-square norm (Zhang and Sennrich 2019) with a small backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from phinetune.engine.kernels.chunks import parts
from phinetune.engine.kernels.compiled import compiled


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, compile: bool = False) -> Tensor:
    """`weight · x / √(mean(x²) + eps)` over the last dimension.

    The statistics are float32 and the normalised x is rounded to x's dtype before it is weighed, as in transformers.

    Args:
        x: shape (..., width).
        weight: shape (width).
        compile: run the compiled form of forward and backward.
    """
    out: Tensor = _RMSNorm.apply(x, weight, eps, compile)  # type: ignore[no-untyped-call]
    return out


class _RMSNorm(torch.autograd.Function):
    """Keeps x and one float32 number a token."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, compile: bool) -> Tensor:
        ctx.compile = compile
        out: Tensor
        if compile:
            out, scale = compiled(_forward)(x, weight, eps)
        else:
            out, scale = torch.empty_like(x), x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)
            for part in parts(x):
                out[part], scale[part] = _forward(x[part], weight, eps)
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
            for part in parts(x):
                dx[part] = _backward(grad[part], x[part], weight, scale[part])
        return dx, d_weight, None, None


def _forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    scale = (length.square() / x.shape[-1] + eps).rsqrt()
    return (x * scale).to(x.dtype) * weight, scale


def _backward(grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """With n = x · scale and g = grad · weight: dx = scale · (g − n · mean(g · n))."""
    g = (grad * weight).float()
    pull = (g * x).sum(-1, keepdim=True) * scale.square() / x.shape[-1]
    return g.addcmul_(x.float(), pull, value=-1).mul_(scale).to(x.dtype)
