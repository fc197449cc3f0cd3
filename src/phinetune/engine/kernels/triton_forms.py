"""Element-wise operators for CUDA devices in Triton, which torch's CUDA builds bring. Each reads its data once.

They take what the torch forms take, compute in float32, and round where those round, or less often. Imported only where
a tensor lies on such a device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

COLUMNS = 1024  # features of a row that a program of SwiGLU computes
HEADS = 8  # heads of a token that a program of the rotation computes


@triton.jit  # type: ignore[untyped-decorator]
def _rms_norm(x, residual, weight, out, scale, total, eps, width, adds: tl.constexpr, block: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.arange(0, block)
    seen, start = at < width, tl.program_id(0).to(tl.int64) * width
    values = tl.load(x + start + at, mask=seen, other=0.0)
    kind = values.dtype
    if adds:
        values = (values.to(tl.float32) + tl.load(residual + start + at, mask=seen, other=0.0).to(tl.float32)).to(kind)
        tl.store(total + start + at, values, mask=seen)
    wide = values.to(tl.float32)
    factor = 1.0 / tl.sqrt(tl.sum(wide * wide, 0) / width + eps)
    tl.store(scale + tl.program_id(0), factor)
    weights = tl.load(weight + at, mask=seen, other=0.0).to(tl.float32)
    tl.store(out + start + at, ((wide * factor).to(kind).to(tl.float32) * weights).to(kind), mask=seen)


@triton.jit  # type: ignore[untyped-decorator]
def _rms_norm_backward(grad, x, weight, scale, beside, dx, width, adds: tl.constexpr, block: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.arange(0, block)
    seen, start = at < width, tl.program_id(0).to(tl.int64) * width
    wide = tl.load(x + start + at, mask=seen, other=0.0).to(tl.float32)
    weights = tl.load(weight + at, mask=seen, other=0.0).to(tl.float32)
    slope = tl.load(grad + start + at, mask=seen, other=0.0).to(tl.float32) * weights
    factor = tl.load(scale + tl.program_id(0))
    share = tl.sum(slope * wide, 0) * factor * factor / width
    found = (slope - wide * share) * factor
    if adds:
        found += tl.load(beside + start + at, mask=seen, other=0.0).to(tl.float32)
    tl.store(dx + start + at, found.to(dx.dtype.element_ty), mask=seen)


@triton.jit  # type: ignore[untyped-decorator]
def _swiglu(gate_up, out, width, block: tl.constexpr):  # type: ignore[no-untyped-def]
    row, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * block + tl.arange(0, block)
    seen = at < width
    gate = tl.load(gate_up + row * 2 * width + at, mask=seen, other=0.0)
    up = tl.load(gate_up + (row * 2 + 1) * width + at, mask=seen, other=0.0).to(tl.float32)
    wide = gate.to(tl.float32)
    active = (wide * tl.sigmoid(wide)).to(gate.dtype).to(tl.float32)
    tl.store(out + row * width + at, (active * up).to(gate.dtype), mask=seen)


@triton.jit  # type: ignore[untyped-decorator]
def _swiglu_backward(grad, gate_up, out, width, block: tl.constexpr):  # type: ignore[no-untyped-def]
    row, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * block + tl.arange(0, block)
    seen, first = at < width, row * 2 * width + at
    gate = tl.load(gate_up + first, mask=seen, other=0.0)
    up = tl.load(gate_up + first + width, mask=seen, other=0.0).to(tl.float32)
    pull = tl.load(grad + row * width + at, mask=seen, other=0.0).to(tl.float32)
    wide = gate.to(tl.float32)
    sigmoid = tl.sigmoid(wide)
    d_gate = pull * up * sigmoid * (1.0 + wide * (1.0 - sigmoid))
    tl.store(out + first, d_gate.to(gate.dtype), mask=seen)
    tl.store(out + first + width, (pull * wide * sigmoid).to(gate.dtype), mask=seen)


@triton.jit  # type: ignore[untyped-decorator]
def _rotate(states, cos, sin, sign, heads, half, token_step, head_step, several: tl.constexpr, block: tl.constexpr):  # type: ignore[no-untyped-def]
    token, at = tl.program_id(0).to(tl.int64), tl.arange(0, block)
    head = tl.program_id(1) * several + tl.arange(0, several)
    c = tl.load(cos + token * half + at, mask=at < half, other=0.0).to(tl.float32)[None, :]
    s = tl.load(sin + token * half + at, mask=at < half, other=0.0).to(tl.float32)[None, :] * sign
    seen = (head < heads)[:, None] & (at < half)[None, :]
    first = states + token * token_step + head[:, None] * head_step + at[None, :]
    low = tl.load(first, mask=seen, other=0.0)
    high = tl.load(first + half, mask=seen, other=0.0).to(tl.float32)
    wide = low.to(tl.float32)
    tl.store(first, (wide * c - high * s).to(low.dtype), mask=seen)
    tl.store(first + half, (high * c + wide * s).to(low.dtype), mask=seen)


def rms_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, out: Tensor, scale: Tensor, total: Tensor | None
) -> None:
    """`kernels.norm`'s forward."""
    adds, x = residual is not None, x.contiguous()
    beside, made = (x, x) if residual is None or total is None else (residual.contiguous(), total)
    _rms_norm[(len(x),)](x, beside, weight, out, scale, made, eps, x.shape[1], adds, **_one_row(x))


def rms_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor, beside: Tensor | None, dx: Tensor
) -> None:
    """`kernels.norm`'s gradient of x."""
    adds, x = beside is not None, x.contiguous()
    added = x if beside is None else beside.contiguous()
    _rms_norm_backward[(len(x),)](grad.contiguous(), x, weight, scale, added, dx, x.shape[1], adds, **_one_row(x))


def swiglu(gate_up: Tensor, out: Tensor) -> None:
    """`kernels.swiglu`'s forward."""
    width = out.shape[1]
    _swiglu[(len(out), triton.cdiv(width, COLUMNS))](gate_up.contiguous(), out, width, COLUMNS)


def swiglu_backward(grad: Tensor, gate_up: Tensor, out: Tensor) -> None:
    """`kernels.swiglu`'s gradient of gate and up."""
    width = grad.shape[1]
    parts = (len(grad), triton.cdiv(width, COLUMNS))
    _swiglu_backward[parts](grad.contiguous(), gate_up.contiguous(), out, width, COLUMNS)


def rotate_(states: Tensor, cos: Tensor, sin: Tensor, sign: float) -> None:
    """`kernels.rotary`'s rotation, in place, whatever the strides of tokens and heads."""
    (tokens, heads, _), half = states.shape, cos.shape[1]
    steps, block = states.stride()[:2], triton.next_power_of_2(half)
    parts = (tokens, triton.cdiv(heads, HEADS))
    _rotate[parts](states, cos.contiguous(), sin.contiguous(), sign, heads, half, *steps, HEADS, block)


def _one_row(x: Tensor) -> dict[str, int]:
    """How a program holds a whole row of x."""
    block = triton.next_power_of_2(x.shape[1])
    return {"block": block, "num_warps": min(16, max(1, block // 512))}


# By the names of `native.operator.Operator`.
FORMS: dict[str, Callable[..., Any]] = {
    "rms_norm": rms_norm,
    "rms_norm_backward": rms_norm_backward,
    "swiglu": swiglu,
    "swiglu_backward": swiglu_backward,
    "rotate_": rotate_,
}
