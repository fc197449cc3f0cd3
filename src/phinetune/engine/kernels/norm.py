"""Root-mean-square norm (RMSNorm, arXiv 1910.07467) with its own backward, which keeps little memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from phinetune.engine.kernels import room
from phinetune.engine.kernels.chunks import row_chunks
from phinetune.engine.kernels.compiled import compiled
from phinetune.engine.kernels.native.operator import Operator, drawn, rows_of


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, compile: bool = False) -> Tensor:
    """`weight · x / √(mean(x²) + eps)` over the last dimension.

    As in transformers, the mean square is computed in float32, and the normalised x is rounded to x's dtype before it
    is multiplied by the weight.

    Args:
        x: shape (..., width).
        weight: shape (width).
        compile: whether forward and backward are compiled where they have no native form.

    Returns:
        shape (..., width).
    """
    rows, compile = rows_of(x), compile and not _forward.is_native(x)
    out: Tensor
    if torch.is_grad_enabled():
        out = _RMSNorm.apply(rows, weight, eps, compile)  # type: ignore[no-untyped-call]
    else:  # a step of an answer has so little to compute that a node of a graph would be a good part of it
        out, _ = _computed(rows, weight, eps, compile)
    return out if x.dim() == 2 else out.view(x.shape)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x + residual, and its `rms_norm`, in one pass over both; backwards in one pass, too.

    Args:
        x, residual: shape (..., width), of one dtype.
        weight: shape (width).

    Returns:
        the sum and the norm, each of shape (..., width).
    """
    total: Tensor
    total, out = _AddRMSNorm.apply(rows_of(x), rows_of(residual), weight, eps)  # type: ignore[no-untyped-call]
    return total.view(x.shape), out.view(x.shape)


class _RMSNorm(torch.autograd.Function):
    """Keeps x, the weight and one float32 number per token for the backward. x has shape (rows, width).

    What is not compiled has `behind` elements of room behind its rows (`kernels.room`).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, compile: bool, behind: int = 0) -> Tensor:
        ctx.compile = compile
        out, scale = _computed(x, weight, eps, compile, behind)
        ctx.save_for_backward(x, weight, scale)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        dx = None
        if needs_x and ctx.compile:
            dx = compiled(_slope)(grad, x, weight, scale)
        elif needs_x:
            dx = _grad_of_x(grad, x, weight, scale, None)
        return dx, _grad_of_weight(grad, x, weight, scale) if needs_weight else None, None, None, None


class _AddRMSNorm(torch.autograd.Function):
    """Keeps the sum, the weight and one float32 number per token. All have shape (rows, width)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        out, total, scale = torch.empty_like(x), torch.empty_like(x), x.new_empty(len(x), dtype=torch.float32)
        _forward(x, residual, _read(weight, x), eps, out, scale, total)
        ctx.save_for_backward(total, weight, scale)
        return total, out

    @staticmethod
    def backward(ctx: Any, d_total: Tensor, grad: Tensor) -> tuple[Tensor | None, ...]:
        total, weight, scale = ctx.saved_tensors
        needs_x, needs_residual, needs_weight = ctx.needs_input_grad[:3]
        dx = _grad_of_x(grad, total, weight, scale, rows_of(d_total)) if needs_x or needs_residual else None
        return (
            dx if needs_x else None,
            dx if needs_residual else None,
            _grad_of_weight(grad, total, weight, scale) if needs_weight else None,
            None,
        )


def _computed(x: Tensor, weight: Tensor, eps: float, compile: bool, behind: int = 0) -> tuple[Tensor, Tensor]:
    """The norm, shape (rows, width), and the factor of each row."""
    if compile:
        return compiled(_normed)(x, weight, eps)  # type: ignore[no-any-return]
    out, scale = room.empty(x, len(x), x.shape[1], behind), x.new_empty(len(x), dtype=torch.float32)
    _forward(x, None, _read(weight, x), eps, out, scale, None)
    return out, scale


def _grad_of_x(grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor, beside: Tensor | None) -> Tensor:
    dx = torch.empty_like(x)
    _backward(rows_of(grad), x, _read(weight, x), scale, beside, dx)
    return dx


def _read(weight: Tensor, x: Tensor) -> Tensor:
    """The weight as the form that takes x reads it: the native one of a CPU in float32."""
    return weight.float() if x.device.type == "cpu" and _forward.is_native(x) else weight


def _grad_of_weight(grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    return (grad * (x * scale[:, None])).sum(0).to(weight.dtype)


def _forward_by_torch(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, out: Tensor, scale: Tensor, total: Tensor | None
) -> None:
    """Write the norm of x to `out`, and 1 / √(mean(x²) + eps) to `scale`, shape (rows).

    With `residual`, that of x + residual, which is written to `total`.
    """
    if residual is not None and total is not None:
        x = torch.add(x, residual, out=total)
    for rows in row_chunks(x):
        out[rows], scale[rows] = _normed(x[rows], weight, eps)


def _normed(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The output, shape (rows, width), and scale = 1 / √(mean(x²) + eps), shape (rows)."""
    length = torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32)
    scale = (length.square() / x.shape[-1] + eps).rsqrt()
    return (x * scale[:, None]).to(x.dtype) * weight, scale


def _backward_by_torch(
    grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor, beside: Tensor | None, dx: Tensor
) -> None:
    """Write the gradient of x to `dx`, plus `beside` where it is given: the gradient that x has from elsewhere."""
    for rows in row_chunks(x):
        dx[rows] = _slope(grad[rows], x[rows], weight, scale[rows])
    if beside is not None:
        dx += beside


def _slope(grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """dx = scale · (g − n · mean(g · n)), where n = x · scale and g = grad · weight."""
    g, by = (grad * weight).float(), scale[:, None]
    share = (g * x).sum(-1, keepdim=True) * by.square() / x.shape[-1]
    return g.addcmul_(x.float(), share, value=-1).mul_(by).to(x.dtype)


def _sample(kind: torch.dtype) -> tuple[Any, ...]:
    x, residual = drawn((256, 3072), (256, 3072), kind=kind)
    return x, residual, torch.ones(3072), 1e-5, torch.empty_like(x), torch.empty(256), torch.empty_like(x)


def _sample_backward(kind: torch.dtype) -> tuple[Any, ...]:
    grad, x = drawn((256, 3072), (256, 3072), kind=kind)
    return grad, x, torch.ones(3072), torch.ones(256), None, torch.empty_like(x)


_forward = Operator("rms_norm", _forward_by_torch, _sample)
_backward = Operator("rms_norm_backward", _backward_by_torch, _sample_backward)
