"""The base product and its low-rank update in one function with a hand-written backward.

For `x` of shape (..., in), a frozen `weight` W (out, in), and adapters A (r, in) and B (out, r) (LoRA, Hu et al.
2021, section 4.1):

    h = x Aᵀ                      (..., r), the only thing kept for the backward besides x
    y = x Wᵀ + b + s · h Bᵀ

With `splits`, W stands for several layers stacked by rows (q, k and v, say), each split having adapters of its own
or none: A holds the adapters' A stacked (g·r, in), B theirs stacked (rows of the adapted splits, r).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from phinetune.engine.kernels import matmul as products
from phinetune.engine.kernels.matmul import Blocks

# A split with an adapter: the rows of the output it covers, and the rows of B that hold it.
Span = tuple[int, int, int, int]


def lora_linear(
    x: Tensor,
    weight: Tensor | Blocks,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    adapter_input: Tensor | None = None,
    spans: Sequence[Span] | None = None,
) -> Tensor:
    """`x Wᵀ + b + scaling · (x Aᵀ) Bᵀ`.

    Args:
        x: shape (..., in).
        weight: shape (out, in), any strides; trained as well if it requires a gradient. Or a function that gives its
            rows block by block (expands a quantised one, say; see `phinetune.engine.kernels.matmul`): called here and
            again in the backward, nothing kept.
        bias: shape (out) or None.
        lora_A: shape (r, in), or (g·r, in) with `spans` for g adapters.
        lora_B: shape (out, r), or (rows of the adapted splits, r) with `spans`.
        scaling: alpha / r, or alpha / √r.
        adapter_input: what the adapter sees in place of x (x after dropout); same shape as x.
        spans: one (start, stop, B start, B stop) an adapted split; None is one adapter over all rows.

    Returns:
        shape (..., out), in x's dtype. Adapters of another dtype (float32 beside a bfloat16 base) are cast once, or
        not at all where the product goes through float32.
    """
    if torch.is_autocast_enabled(x.device.type):
        # In place, addmm is not among the operators that autocast casts for.
        kind = torch.get_autocast_dtype(x.device.type)
        x = x.to(kind)
        weight = weight.to(kind) if isinstance(weight, Tensor) else weight
        adapter_input = None if adapter_input is None else adapter_input.to(kind)
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    seen = None if adapter_input is None else adapter_input.reshape(rows.shape)
    source = _by_blocks(rows, weight, spans)
    kind = x.dtype if source is None else products.work_dtype(x)
    if lora_A.dtype != kind or lora_B.dtype != kind:
        lora_A, lora_B = lora_A.to(kind), lora_B.to(kind)
    if source is None:
        out = _LoraLinear.apply(rows, weight, bias, lora_A, lora_B, scaling, seen, spans)  # type: ignore[no-untyped-call]
    else:
        out = _blocked(rows, source, bias, lora_A, lora_B, scaling, seen)
    return out if x.dim() == 2 else out.view(*x.shape[:-1], out.shape[1])  # type: ignore[no-any-return]


def _by_blocks(x: Tensor, weight: Tensor | Blocks, spans: Sequence[Span] | None) -> Blocks | None:
    """How to read a frozen weight block by block, where that is how its product is taken."""
    if not isinstance(weight, Tensor):
        return weight
    if x.dtype not in products.HALF or spans is not None or weight.requires_grad or not products.is_wide(x):
        return None
    return functools.partial(products.blocks, weight)


class _LoraLinear(torch.autograd.Function):
    """x of shape (rows, in) to (rows, out). Keeps what the adapter saw and h, besides the parameters.

    On small layers Python's own time rules, so there is no call here that could be left out.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        scaling: float,
        seen: Tensor | None,
        spans: Sequence[Span] | None,
    ) -> Tensor:
        ctx.scaling, ctx.apart, ctx.spans = scaling, seen is not None, spans
        if seen is None:
            seen = x
        hidden = torch.mm(seen, a.t())
        out = F.linear(x, weight, bias)
        if spans is None:
            out.addmm_(hidden, b.t(), alpha=scaling)
        else:
            for (start, stop, first, last), part in _by_split(spans, hidden, b.shape[1]):
                out[:, start:stop].addmm_(part, b[first:last].t(), alpha=scaling)
        ctx.save_for_backward(seen, hidden, weight, a, b, x if ctx.apart and weight.requires_grad else None)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # what once_differentiable says, without its time
            raise RuntimeError("lora_linear has no second derivative (create_graph=True)")
        seen, hidden, weight, a, b, x = ctx.saved_tensors
        spans = ctx.spans
        needs_x, needs_weight, needs_bias, needs_a, needs_b, _, needs_seen, _ = ctx.needs_input_grad
        d_hidden = _scaled_mm(grad, b, ctx.scaling) if spans is None else _grad_of_hidden(grad, b, ctx.scaling, spans)
        dx = torch.mm(grad, weight) if needs_x else None
        d_b = d_seen = None
        if not ctx.apart:
            dx = None if dx is None else dx.addmm_(d_hidden, a)
        elif needs_seen:
            d_seen = torch.mm(d_hidden, a)
        if needs_b and spans is None:
            d_b = _scaled_mm(grad.t(), hidden, ctx.scaling)
        elif needs_b:
            d_b = _grad_of_b(grad, hidden, b, ctx.scaling, spans)
        return (
            dx,
            torch.mm(grad.t(), seen if x is None else x) if needs_weight else None,
            grad.sum(0) if needs_bias else None,
            torch.mm(d_hidden.t(), seen) if needs_a else None,
            d_b,
            None,
            d_seen,
            None,
        )


def _blocked(
    x: Tensor, weight: Blocks, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float, seen: Tensor | None
) -> Tensor:
    kept = None
    if x.requires_grad and torch.is_grad_enabled():
        x = _Kept.apply(x, seen, a.detach(), b.detach())  # type: ignore[no-untyped-call]
        kept = x.grad_fn
    out: Tensor = _BlockedLoraLinear.apply(x, weight, bias, a, b, scaling, seen, kept)  # type: ignore[no-untyped-call]
    return out


class _Kept(torch.autograd.Function):
    """x as it is. Keeps what the backward of the product after it needs, before that product is taken.

    `torch.utils.checkpoint` stops to compute again at the last tensor that is kept, so a layer's last product, which
    nothing in the layer's backward needs, is not taken a second time.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, seen: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(x if seen is None else seen, a, b)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad, None, None, None


class _BlockedLoraLinear(torch.autograd.Function):
    """The same over a frozen weight that is read block by block, in `products.work_dtype`; the adapters are in it.

    h is computed again in the backward, where what the adapter saw is converted anyway.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Blocks,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        scaling: float,
        seen: Tensor | None,
        kept: Any,
    ) -> Tensor:
        ctx.weight, ctx.scaling, ctx.apart, ctx.kept = weight, scaling, seen is not None, kept
        size, out = products.block_size(x), x.new_empty(len(x), len(b))
        for part in products.parts(x):
            wide = products.widened(x[part], a.dtype, "left")
            hidden = torch.mm(wide if seen is None else products.widened(seen[part], a.dtype, "seen"), a.t())
            for rows, block in weight(size, a.dtype):
                place = out[part, rows]
                made = products.product(wide, block.t(), place).addmm_(hidden, b[rows].t(), alpha=scaling)
                products.settle(made if bias is None else made.add_(bias[rows]), place)
        if kept is None:
            ctx.save_for_backward(x if seen is None else seen, a, b)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("lora_linear has no second derivative (create_graph=True)")
        seen, a, b = (ctx if ctx.kept is None else ctx.kept).saved_tensors
        needs_x, _, needs_bias, _, _, _, needs_seen, _ = ctx.needs_input_grad
        dx = torch.empty_like(seen) if needs_x else None
        d_seen = torch.empty_like(seen) if needs_seen else None
        d_a, d_b = torch.zeros_like(a), torch.zeros_like(b)
        for part in products.parts(grad):
            total = None if dx is None else products.zeros(dx[part], a.dtype)
            d_hidden = _through_blocks(ctx, grad[part], seen[part], (a, b), (d_a, d_b), total)
            if d_seen is not None:
                products.settle(products.product(d_hidden, a, d_seen[part]), d_seen[part])
            if dx is not None and total is not None:
                products.settle(total if ctx.apart else total.addmm_(d_hidden, a), dx[part])
        return dx, None, grad.sum(0) if needs_bias else None, d_a, d_b, None, d_seen, None


def _through_blocks(
    ctx: Any,
    grad: Tensor,
    seen: Tensor,
    adapters: tuple[Tensor, Tensor],
    grads: tuple[Tensor, Tensor],
    dx: Tensor | None,
) -> Tensor:
    """Add what these rows give to A's, B's and x's gradients, x's without the adapter's part; the gradient of h."""
    (a, b), (d_a, d_b) = adapters, grads
    wide = products.widened(seen, a.dtype, "seen")
    hidden = torch.mm(wide, a.t())
    d_hidden = torch.zeros_like(hidden)
    for rows, block in ctx.weight(products.block_size(grad), a.dtype):
        d_out = products.widened(grad[:, rows], a.dtype, "gradient")
        d_hidden.addmm_(d_out, b[rows], alpha=ctx.scaling)
        d_b[rows].addmm_(d_out.t(), hidden, alpha=ctx.scaling)
        if dx is not None:
            dx.addmm_(d_out, block)
    d_a.addmm_(d_hidden.t(), wide)
    return d_hidden


def _by_split(spans: Sequence[Span], hidden: Tensor, rank: int) -> Iterator[tuple[Span, Tensor]]:
    """Each adapted split with its part of h, (rows, r)."""
    return zip(spans, hidden.split(rank, dim=1), strict=True)


def _scaled_mm(left: Tensor, right: Tensor, scaling: float) -> Tensor:
    """s · left right in one call; with beta 0 the first argument is never read."""
    return torch.addmm(left.new_empty(left.shape[0], right.shape[1]), left, right, beta=0, alpha=scaling)


def _grad_of_hidden(grad: Tensor, b: Tensor, scaling: float, spans: Sequence[Span]) -> Tensor:
    """s · dy B, split by split, side by side: (rows, g·r)."""
    parts = [_scaled_mm(grad[:, start:stop], b[first:last], scaling) for start, stop, first, last in spans]
    return torch.cat(parts, dim=1)


def _grad_of_b(grad: Tensor, hidden: Tensor, b: Tensor, scaling: float, spans: Sequence[Span]) -> Tensor:
    """s · dyᵀ h, split by split, stacked as B is."""
    parts = _by_split(spans, hidden, b.shape[1])
    return torch.cat([_scaled_mm(grad[:, start:stop].t(), part, scaling) for (start, stop, _, _), part in parts])


def delta_weight(lora_A: Tensor, lora_B: Tensor, scaling: float, out: int, spans: Sequence[Span] | None) -> Tensor:
    """s · B A, the update that the adapters stand for, in at least float32: (out, in), zero where there is none."""
    dtype = torch.promote_types(lora_A.dtype, torch.float32)
    a, b = lora_A.to(dtype), lora_B.to(dtype)
    if spans is None:
        return (b @ a) * scaling
    rank = b.shape[1]
    delta = a.new_zeros(out, a.shape[1])
    for i, (start, stop, first, last) in enumerate(spans):
        delta[start:stop] = (b[first:last] @ a[i * rank : (i + 1) * rank]) * scaling
    return delta
