"""SwiGLU (Shazeer 2020): the gate and the value lie side by side in one tensor."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from phinetune.engine.kernels.chunks import parts
from phinetune.engine.kernels.compiled import compiled


def swiglu(gate_up: Tensor, *, compile: bool = False) -> Tensor:
    """`silu(gate) · up` of shape (..., 2 · width) to (..., width), the gate being the first half.

    Args:
        compile: run the compiled form of forward and backward.
    """
    rows = gate_up if gate_up.dim() == 2 else gate_up.reshape(-1, gate_up.shape[-1])
    out: Tensor = _SwiGLU.apply(rows, compile)  # type: ignore[no-untyped-call]
    return out if gate_up.dim() == 2 else out.view(*gate_up.shape[:-1], out.shape[1])


class _SwiGLU(torch.autograd.Function):
    """Keeps its input alone, and computes silu again."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, compile: bool) -> Tensor:
        ctx.compile = compile
        ctx.save_for_backward(gate_up)
        if compile:
            return compiled(_forward)(gate_up)  # type: ignore[no-any-return]
        out = gate_up.new_empty(len(gate_up), gate_up.shape[1] // 2)
        for part in parts(gate_up):
            out[part] = _forward(gate_up[part])
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (gate_up,) = ctx.saved_tensors
        if ctx.compile:
            return compiled(_formula)(grad, gate_up), None
        out = torch.empty_like(gate_up)
        for part in parts(gate_up):
            _backward(grad[part], gate_up[part], out[part])
        return out, None


def _forward(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def _formula(grad: Tensor, gate_up: Tensor) -> Tensor:
    """For the compiler, which fuses it into one loop."""
    gate, up = gate_up.chunk(2, dim=-1)
    open_ = torch.sigmoid(gate)
    return torch.cat([grad * up * open_ * (1 + gate * (1 - open_)), grad * gate * open_], dim=-1)


def _backward(grad: Tensor, gate_up: Tensor, out: Tensor) -> None:
    """The same by the operators that torch has fused already, each in its place: fresh memory costs as much time."""
    gate, up = gate_up.chunk(2, dim=-1)
    d_gate, d_up = out.chunk(2, dim=-1)
    torch.ops.aten.silu.out(gate, out=d_up).mul_(grad)
    torch.mul(grad, up, out=d_gate)
    torch.ops.aten.silu_backward.grad_input(d_gate, gate, grad_input=d_gate)
