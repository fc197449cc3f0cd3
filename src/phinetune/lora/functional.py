"""The base product and its low-rank update in one function with a hand-written backward.

For `x` of shape (..., in), a frozen `weight` W of shape (out, in), and an adapter A of shape (r, in) and B of shape
(out, r) (LoRA, Hu et al. 2021, section 4.1):

    h = x Aᵀ                      (..., r), kept for the backward, as x is
    y = x Wᵀ + b + s · h Bᵀ

With `spans`, W stands for several layers that are stacked by rows, for example q, k and v. Each of these splits has an
adapter of its own or none. For g adapted splits, their A are stacked to shape (g·r, in), and their B to shape
(rows of the adapted splits, r).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from phinetune.engine.kernels import matmul
from phinetune.engine.kernels.matmul import BlockReader
from phinetune.engine.kernels.unrecorded import Kept, call
from phinetune.lora import one_product
from phinetune.lora.by_blocks import LoraLinearByBlocks, lora_linear_by_blocks

# A split with an adapter: (start, stop) of its output features, then (start, stop) of its rows in the stacked B.
Span = tuple[int, int, int, int]


def lora_linear(
    x: Tensor,
    weight: Tensor | BlockReader,
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
        weight: shape (out, in), any strides. If it requires a gradient, it gets one. Or a function that reads the
            weight block by block and can expand a quantised one (`BlockReader` of `phinetune.engine.kernels.matmul`).
            The function is called here and again in the backward; the blocks are not kept.
        bias: shape (out) or None.
        lora_A: shape (r, in), or (g·r, in) with `spans` for g adapters.
        lora_B: shape (out, r), or (rows of the adapted splits, r) with `spans`.
        scaling: alpha / r, or alpha / √r.
        adapter_input: what the adapter sees in place of x, for example x after dropout. Same shape as x.
        spans: one (start, stop, start in B, stop in B) for each adapted split. None: one adapter covers all rows.

    Returns:
        shape (..., out), in x's dtype. Adapters may have another dtype, for example float32 with a bfloat16 base. They
        are cast once, or not at all if the product goes through float32.

    Raises:
        RuntimeError: in the backward, if it is asked for a second derivative.
    """
    if torch.is_autocast_enabled(x.device.type):
        # Autocast does not cast the arguments of `addmm_`, so they are cast here.
        kind = torch.get_autocast_dtype(x.device.type)
        x = x.to(kind)
        weight = weight.to(kind) if isinstance(weight, Tensor) else weight
        adapter_input = None if adapter_input is None else adapter_input.to(kind)
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    seen = None if adapter_input is None else adapter_input.reshape(rows.shape)
    if spans is None and isinstance(weight, Tensor) and matmul.takes_few(rows, weight):
        a, b = lora_A.to(x.dtype), lora_B.to(x.dtype)
        out = matmul.linear(rows, weight, bias)
        out.addmm_(torch.mm(rows if seen is None else seen, a.t()), b.t(), alpha=scaling)
        return out.view(*x.shape[:-1], len(weight))
    reader = _block_reader(rows, weight, spans)
    kind = x.dtype if reader is None else matmul.product_dtype(x)
    is_plain = reader is None and spans is None and seen is None
    matrix = one_product.matrix_of(weight, lora_B) if is_plain else None
    if lora_A.dtype != kind or lora_B.dtype != kind:
        lora_A, lora_B = lora_A.to(kind), lora_B.to(kind)
    if reader is None:
        out = _LoraLinear.apply(rows, weight, bias, lora_A, lora_B, scaling, seen, spans, matrix)  # type: ignore[no-untyped-call]
    else:
        out = lora_linear_by_blocks(rows, reader, bias, lora_A, lora_B, scaling, seen)
    return out if x.dim() == 2 else out.view(*x.shape[:-1], out.shape[1])


def _block_reader(x: Tensor, weight: Tensor | BlockReader, spans: Sequence[Span] | None) -> BlockReader | None:
    """The reader of the weight's blocks, if its product is taken block by block; else None.

    A GPU has room for a whole expanded weight, and multiplies it at once.
    """
    if not isinstance(weight, Tensor):
        return weight if x.device.type == "cpu" else None
    whole = x.dtype not in matmul.HALF_DTYPES or spans is not None or weight.requires_grad
    if whole or not matmul.goes_through_float32(x):
        return None
    return functools.partial(matmul.read_blocks, weight)


class _LoraLinear(torch.autograd.Function):
    """x of shape (rows, in) to (rows, out). Keeps what the adapter saw, h and the parameters for the backward.

    Of a weight that a function reads it keeps the function, and expands it in each direction.

    On small layers most of the time is Python's own. So this code makes no call that it can do without.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | BlockReader,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        scaling: float,
        seen: Tensor | None,
        spans: Sequence[Span] | None,
        matrix: Tensor | None = None,
        has_room: bool = False,
    ) -> Tensor:
        hidden = _LoraLinear.keep(ctx, x, weight, a, b, scaling, seen, spans, matrix)
        if matrix is not None:
            out = one_product.forward(x, hidden, matrix, len(b), has_room)
            return out if bias is None else out.add_(bias)
        whole = matmul.whole(weight, x.dtype)
        if spans is None and bias is None:
            return _product_and_update(x, whole.t(), hidden, b.t(), scaling)
        out = F.linear(x, whole, bias)
        if spans is None:
            out.addmm_(hidden, b.t(), alpha=scaling)
        else:
            for (start, stop, first, last), split in _by_split(spans, hidden, b.shape[1]):
                out[:, start:stop].addmm_(split, b[first:last].t(), alpha=scaling)
        return out

    @staticmethod
    def keep(
        ctx: Any,
        x: Tensor,
        weight: Tensor | BlockReader,
        a: Tensor,
        b: Tensor,
        scaling: float,
        seen: Tensor | None,
        spans: Sequence[Span] | None,
        matrix: Tensor | None = None,
        has_room: bool = False,
    ) -> Tensor:
        """Keep what the backward needs, and return h; for one product s·h, which is rounded as often."""
        held = weight if isinstance(weight, Tensor) else None
        ctx.scaling, ctx.separate, ctx.spans, ctx.matrix = scaling, seen is not None, spans, matrix
        ctx.reader = weight if held is None else None
        if seen is None:
            seen = x
        ctx.of_b = scaling if matrix is None else 1.0
        hidden = torch.mm(seen, a.t()) if matrix is None else _scaled_mm(seen, a.t(), scaling)
        trains = held is not None and held.requires_grad
        ctx.save_for_backward(seen, hidden, held, a, b, x if ctx.separate and trains else None)
        return hidden

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # the check of torch's `once_differentiable`, which would take longer
            raise RuntimeError("lora_linear has no second derivative (create_graph=True)")
        seen, hidden, weight, a, b, x = ctx.saved_tensors
        spans = ctx.spans
        needs_x, needs_weight, needs_bias, needs_a, needs_b, _, needs_seen = ctx.needs_input_grad[:7]
        d_hidden = _scaled_mm(grad, b, ctx.scaling) if spans is None else _grad_of_hidden(grad, b, ctx.scaling, spans)
        dx = d_b = d_seen = None
        if needs_x and ctx.matrix is not None:
            dx = one_product.backward(grad, d_hidden, ctx.matrix, a, getattr(ctx, "has_room", False))
        elif needs_x:
            whole = matmul.whole(ctx.reader or weight, grad.dtype)
            dx = torch.mm(grad, whole) if ctx.separate else _product_and_update(grad, whole, d_hidden, a, 1.0)
        if ctx.separate and needs_seen:
            d_seen = torch.mm(d_hidden, a)
        if needs_b and spans is None:
            d_b = _scaled_mm(hidden.t(), grad, ctx.of_b).t()  # the other order reads the gradient across its rows
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
            None,
            None,
        )


@dataclass(frozen=True)
class Projection:
    """A frozen linear layer with or without an adapter, to be called outside of a graph (`kernels.unrecorded`).

    Attributes:
        weight, bias: as in `lora_linear`, but neither trains. Where the weight has room for the adapter
            (`phinetune.lora.one_product`), base and adapter are one product.
        out: rows of the weight.
        a, b: the adapter's A and B; None without an adapter.
        scaling: as in `lora_linear`.
    """

    weight: Tensor | BlockReader
    bias: Tensor | None
    out: int
    a: Tensor | None = None
    b: Tensor | None = None
    scaling: float = 1.0

    @property
    def trains(self) -> bool:
        """Whether the adapter does."""
        return any(matrix is not None and matrix.requires_grad for matrix in (self.a, self.b))

    @property
    def keeps_input(self) -> bool:
        """Whether the backward needs the layer's input."""
        return self.a is not None

    @property
    def matrices(self) -> tuple[Tensor | None, ...]:
        """A and B."""
        return self.a, self.b

    @property
    def room(self) -> int:
        """How much room behind its rows the input, and the output's gradient, should have; see `kernels.room`."""
        rank = 0 if self.a is None else len(self.a)
        return rank if rank <= one_product.room_of(self.weight) else 0

    def __call__(self, x: Tensor, needs_x: bool, has_room: bool = False) -> tuple[Tensor, Kept]:
        """The output for x of shape (rows, in), and what the backward needs.

        Args:
            has_room: x has `room`, in which the call may write.
        """
        function, arguments, needs = self._call(x, needs_x, has_room)
        return call(function, *arguments, needs=needs)

    def backward(self, kept: Kept, grad: Tensor, has_room: bool = False) -> tuple[Tensor | None, list[Tensor | None]]:
        """The gradient of x, and those of `matrices`.

        Args:
            kept: what a call returned. It is let go.
            has_room: the gradient has `room`, in which this may write.
        """
        kept.has_room = has_room
        found = kept.backward(grad)
        return found[0], list(found[3:5])

    def kept(self, x: Tensor, needs_x: bool) -> Kept:
        """What the backward needs, without the output."""
        function, arguments, needs = self._call(x, needs_x, False)
        kept = Kept(function, tuple(i in needs for i in range(len(arguments))))
        x, weight, _, *others = arguments
        function.keep(kept, x, weight, *others)  # type: ignore[attr-defined]
        return kept

    def _call(
        self, x: Tensor, needs_x: bool, has_room: bool
    ) -> tuple[type[torch.autograd.Function], tuple[Any, ...], tuple[int, ...]]:
        """The function, its arguments, and the places of those that need a gradient."""
        reader = _block_reader(x, self.weight, None)
        trained = ((0, needs_x), (3, self.a), (4, self.b))
        needs = tuple(i for i, one in trained if (one.requires_grad if isinstance(one, Tensor) else one))
        if self.a is None or self.b is None:
            return _Frozen, (x, self.weight if reader is None else reader, self.bias, self.out, None), needs
        kind = x.dtype if reader is None else matmul.product_dtype(x)
        a, b = self.a.to(kind), self.b.to(kind)
        if reader is None:
            matrix = one_product.matrix_of(self.weight, self.b)
            return _LoraLinear, (x, self.weight, self.bias, a, b, self.scaling, None, None, matrix, has_room), needs
        return LoraLinearByBlocks, (x, reader, self.bias, a, b, self.scaling, None, None), needs


class _Frozen(torch.autograd.Function):
    """`x Wᵀ + b` without an adapter. Keeps the weight, or its reader."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | BlockReader, bias: Tensor | None, out: int, _: None) -> Tensor:
        _Frozen.keep(ctx, x, weight, out, None)
        if isinstance(weight, Tensor):
            return F.linear(x, weight, bias)
        return matmul.forward_by_blocks(x, weight, out, bias)

    @staticmethod
    def keep(ctx: Any, x: Tensor, weight: Tensor | BlockReader, out: int, _: None) -> None:
        """Keep what the backward needs."""
        ctx.weight, ctx.width = weight, x.shape[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if not ctx.needs_input_grad[0]:
            return (None,) * 5
        weight = ctx.weight
        dx = (
            torch.mm(grad, weight) if isinstance(weight, Tensor) else matmul.backward_by_blocks(grad, weight, ctx.width)
        )
        return dx, None, None, None, None


def _by_split(spans: Sequence[Span], hidden: Tensor, rank: int) -> Iterator[tuple[Span, Tensor]]:
    """Each adapted split with its columns of h, shape (rows, r)."""
    return zip(spans, hidden.split(rank, dim=1), strict=True)


def _product_and_update(x: Tensor, weight: Tensor, hidden: Tensor, factor: Tensor, scaling: float) -> Tensor:
    """`x weight + scaling · hidden factor`. A CPU computes it for some rows at a time, which it multiplies faster."""
    out = x.new_empty(len(x), weight.shape[1])
    for rows in matmul.rows_at_once(x):
        torch.mm(x[rows], weight, out=out[rows]).addmm_(hidden[rows], factor, alpha=scaling)
    return out


def _scaled_mm(left: Tensor, right: Tensor, scaling: float) -> Tensor:
    """s · left right in one call. With beta 0, torch never reads the first argument, so it may be uninitialised."""
    return torch.addmm(left.new_empty(left.shape[0], right.shape[1]), left, right, beta=0, alpha=scaling)


def _grad_of_hidden(grad: Tensor, b: Tensor, scaling: float, spans: Sequence[Span]) -> Tensor:
    """s · dy B for each split, side by side: shape (rows, g·r)."""
    products = [_scaled_mm(grad[:, start:stop], b[first:last], scaling) for start, stop, first, last in spans]
    return torch.cat(products, dim=1)


def _grad_of_b(grad: Tensor, hidden: Tensor, b: Tensor, scaling: float, spans: Sequence[Span]) -> Tensor:
    """s · dyᵀ h for each split, stacked as B is: shape (rows of the adapted splits, r)."""
    splits = _by_split(spans, hidden, b.shape[1])
    return torch.cat([_scaled_mm(grad[:, start:stop].t(), split, scaling) for (start, stop, _, _), split in splits])


def delta_weight(lora_A: Tensor, lora_B: Tensor, scaling: float, out: int, spans: Sequence[Span] | None) -> Tensor:
    """s · B A, the update that the adapters stand for.

    Args:
        lora_A, lora_B, scaling, spans: as in `lora_linear`.
        out: rows of the weight.

    Returns:
        shape (out, in), in float32 or the adapters' wider dtype. Rows of splits without an adapter are zero.
    """
    dtype = torch.promote_types(lora_A.dtype, torch.float32)
    a, b = lora_A.to(dtype), lora_B.to(dtype)
    if spans is None:
        return (b @ a) * scaling
    rank = b.shape[1]
    delta = a.new_zeros(out, a.shape[1])
    for i, (start, stop, first, last) in enumerate(spans):
        delta[start:stop] = (b[first:last] @ a[i * rank : (i + 1) * rank]) * scaling
    return delta
