"""A linear layer with an adapter over a frozen weight that is read block by block.

So half-precision products go through float32, and quantised weights are expanded: `phinetune.engine.kernels.matmul`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from phinetune.engine.kernels import matmul
from phinetune.engine.kernels.matmul import BlockReader


def lora_linear_by_blocks(
    x: Tensor, weight: BlockReader, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float, seen: Tensor | None
) -> Tensor:
    """`lora_linear` for x of shape (rows, in), adapters of `matmul.product_dtype` and no splits."""
    kept = None
    if x.requires_grad and torch.is_grad_enabled():
        x = _KeepForBackward.apply(x, seen, a.detach(), b.detach())  # type: ignore[no-untyped-call]
        kept = x.grad_fn
    out: Tensor = LoraLinearByBlocks.apply(x, weight, bias, a, b, scaling, seen, kept)  # type: ignore[no-untyped-call]
    return out


class _KeepForBackward(torch.autograd.Function):
    """Returns x unchanged. Saves what the backward of the product after it needs, before that product is computed.

    `torch.utils.checkpoint` computes a layer again only up to the last tensor that it has saved. The layer's last
    product comes after that, and no backward in the layer needs its result. So that product is not computed twice.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, seen: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(x if seen is None else seen, a, b)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad, None, None, None


class LoraLinearByBlocks(torch.autograd.Function):
    """The layer over a frozen weight that is read block by block, in the dtype of `matmul.product_dtype`.

    The adapters have that dtype already. h is not kept: the backward converts what the adapter saw in any case, and
    computes h again from it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: BlockReader,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        scaling: float,
        seen: Tensor | None,
        kept: Any,
    ) -> Tensor:
        LoraLinearByBlocks.keep(ctx, x, weight, a, b, scaling, seen, kept)
        size, out = matmul.block_elements(x), x.new_empty(len(x), len(b))
        for chunk in matmul.rows_at_once(x):
            left = matmul.converted(x[chunk], a.dtype, "left")
            hidden = matmul.uncast(left if seen is None else matmul.converted(seen[chunk], a.dtype, "seen"), a.t())
            for rows, block in weight(size, a.dtype):
                place = out[chunk, rows]
                made = matmul.product(left, block.t(), place).addmm_(hidden, b[rows].t(), alpha=scaling)
                matmul.round_into(made if bias is None else made.add_(bias[rows]), place)
        return out

    @staticmethod
    def keep(
        ctx: Any,
        x: Tensor,
        weight: BlockReader,
        a: Tensor,
        b: Tensor,
        scaling: float,
        seen: Tensor | None,
        kept: Any,
    ) -> None:
        """Keep what the backward needs."""
        ctx.weight, ctx.scaling, ctx.separate, ctx.kept = weight, scaling, seen is not None, kept
        if kept is None:
            ctx.save_for_backward(x if seen is None else seen, a, b)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("lora_linear has no second derivative (create_graph=True)")
        seen, a, b = (ctx if ctx.kept is None else ctx.kept).saved_tensors
        needs_x, _, needs_bias, _, _, _, needs_seen, _ = ctx.needs_input_grad
        dx = torch.empty_like(seen) if needs_x else None
        d_seen = torch.empty_like(seen) if needs_seen else None
        d_a, d_b = torch.zeros_like(a), torch.zeros_like(b)
        for chunk in matmul.rows_at_once(grad):
            total = None if dx is None else matmul.accumulator(dx[chunk], a.dtype)
            d_hidden = _backward_by_blocks(ctx, grad[chunk], seen[chunk], (a, b), (d_a, d_b), total)
            if d_seen is not None:
                matmul.round_into(matmul.product(d_hidden, a, d_seen[chunk]), d_seen[chunk])
            if dx is not None and total is not None:
                matmul.round_into(total if ctx.separate else total.addmm_(d_hidden, a), dx[chunk])
        return dx, None, grad.sum(0) if needs_bias else None, d_a, d_b, None, d_seen, None


def _backward_by_blocks(
    ctx: Any,
    grad: Tensor,
    seen: Tensor,
    adapters: tuple[Tensor, Tensor],
    grads: tuple[Tensor, Tensor],
    dx: Tensor | None,
) -> Tensor:
    """Add the gradients that come from some rows of x.

    Args:
        grad, seen: the rows of the output's gradient and of what the adapter saw.
        adapters, grads: A and B, and their gradients, to which is added.
        dx: the rows' gradient of x, to which is added without the adapter's share; or None.

    Returns:
        the gradient of h, shape (rows, r).
    """
    (a, b), (d_a, d_b) = adapters, grads
    inputs = matmul.converted(seen, a.dtype, "seen")
    hidden = matmul.uncast(inputs, a.t())
    d_hidden = torch.zeros_like(hidden)
    for rows, block in ctx.weight(matmul.block_elements(grad), a.dtype):
        d_out = matmul.converted(grad[:, rows], a.dtype, "gradient")
        d_hidden.addmm_(d_out, b[rows], alpha=ctx.scaling)
        d_b[rows].addmm_(d_out.t(), hidden, alpha=ctx.scaling)
        if dx is not None:
            dx.addmm_(d_out, block)
    d_a.addmm_(d_hidden.t(), inputs)
    return d_hidden
