"""SwiGLU (Shazeer 2020). The two projections, gate and up, lie side by side in one tensor."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from phinetune.engine.kernels import room
from phinetune.engine.kernels.chunks import row_chunks
from phinetune.engine.kernels.compiled import compiled
from phinetune.engine.kernels.native.operator import Operator, drawn, rows_of


def swiglu(gate_up: Tensor, *, compile: bool = False) -> Tensor:
    """`silu(gate) · up`.

    Args:
        gate_up: shape (..., 2 · width). The first half is the gate, the second half is up.
        compile: whether forward and backward are compiled where they have no native form.

    Returns:
        shape (..., width).
    """
    rows, compile = rows_of(gate_up), compile and not _forward.is_native(gate_up)
    out: Tensor = _SwiGLU.apply(rows, compile) if torch.is_grad_enabled() else _computed(rows, compile)  # type: ignore[no-untyped-call]
    return out if gate_up.dim() == 2 else out.view(*gate_up.shape[:-1], out.shape[1])


class _SwiGLU(torch.autograd.Function):
    """Keeps only its input for the backward, which computes silu again.

    What is not compiled has room behind its rows (`kernels.room`): `behind` elements the output, `back` the gradient.
    """

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, compile: bool, behind: int = 0, back: int = 0) -> Tensor:
        ctx.compile, ctx.back = compile, back
        ctx.save_for_backward(gate_up)
        return _computed(gate_up, compile, behind)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (gate_up,) = ctx.saved_tensors
        if ctx.compile:
            return compiled(_backward_to_compile)(grad, gate_up), None, None, None
        out = room.empty(gate_up, len(gate_up), gate_up.shape[1], ctx.back)
        _backward(rows_of(grad), gate_up, out)
        return out, None, None, None


def _computed(gate_up: Tensor, compile: bool, behind: int = 0) -> Tensor:
    if compile:
        return compiled(_activated)(gate_up)  # type: ignore[no-any-return]
    out = room.empty(gate_up, len(gate_up), gate_up.shape[1] // 2, behind)
    _forward(gate_up, out)
    return out


def _forward_by_torch(gate_up: Tensor, out: Tensor) -> None:
    for rows in row_chunks(gate_up):
        out[rows] = _activated(gate_up[rows])


def _activated(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def _backward_to_compile(grad: Tensor, gate_up: Tensor) -> Tensor:
    """The gradient of gate_up, shape (rows, 2 · width). The compiler makes one loop of this formula."""
    gate, up = gate_up.chunk(2, dim=-1)
    sigmoid = torch.sigmoid(gate)
    return torch.cat([grad * up * sigmoid * (1 + gate * (1 - sigmoid)), grad * gate * sigmoid], dim=-1)


def _backward_by_torch(grad: Tensor, gate_up: Tensor, out: Tensor) -> None:
    """Write the same gradient to `out`, by operators that torch has fused already.

    Each operator writes into `out` itself: new memory would cost as much time as the operators take.
    """
    for rows in row_chunks(gate_up):
        gate, up = gate_up[rows].chunk(2, dim=-1)
        d_gate, d_up = out[rows].chunk(2, dim=-1)
        torch.ops.aten.silu.out(gate, out=d_up).mul_(grad[rows])
        torch.mul(grad[rows], up, out=d_gate)
        torch.ops.aten.silu_backward.grad_input(d_gate, gate, grad_input=d_gate)


def _sample(kind: torch.dtype) -> tuple[Tensor, ...]:
    (gate_up,) = drawn((256, 2 * 3072), kind=kind)
    return gate_up, gate_up.new_empty(256, 3072)


def _sample_backward(kind: torch.dtype) -> tuple[Tensor, ...]:
    grad, gate_up = drawn((256, 3072), (256, 2 * 3072), kind=kind)
    return grad, gate_up, torch.empty_like(gate_up)


_forward = Operator("swiglu", _forward_by_torch, _sample)
_backward = Operator("swiglu_backward", _backward_by_torch, _sample_backward)
