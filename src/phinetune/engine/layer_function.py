"""A decoder layer of a packed row as one autograd function with its own backward.

It computes what the layer's modules compute, by the same functions, in the same order. What the modules would record
as some twenty nodes is one here. At `Level.LAYER` the MLP is computed for some rows at a time, forwards and backwards,
so that its wide tensors never exist for a whole long row.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from phinetune.engine.activation_memory import MLP_ROWS, Level
from phinetune.engine.attention_plan import Contexts, Groups, Heads, Trees
from phinetune.engine.kernels import room
from phinetune.engine.kernels.attention import _Attention
from phinetune.engine.kernels.matmul import row_slices
from phinetune.engine.kernels.norm import _RMSNorm
from phinetune.engine.kernels.swiglu import _SwiGLU
from phinetune.engine.kernels.unrecorded import Kept, call
from phinetune.engine.side_by_side import SideBySide
from phinetune.lora.functional import Projection


@dataclass(frozen=True)
class Norm:
    """An RMSNorm whose weight is frozen."""

    weight: Tensor
    eps: float
    compile: bool

    def __call__(self, x: Tensor, needed: bool, behind: int = 0) -> tuple[Tensor, Kept]:
        return call(_RMSNorm, x, self.weight, self.eps, self.compile, behind, needs=(0,) if needed else ())


@dataclass(frozen=True)
class LayerParts:
    """The parts of a layer.

    Attributes:
        norms: before attention, and before the MLP.
        compile: whether SwiGLU runs compiled.
    """

    norms: tuple[Norm, Norm]
    qkv: Projection | SideBySide
    o: Projection | SideBySide
    gate_up: Projection | SideBySide
    down: Projection | SideBySide
    heads: Heads
    compile: bool

    @property
    def attention_matrices(self) -> tuple[Tensor | None, ...]:
        """A and B of all that qkv and o have."""
        return *self.qkv.matrices, *self.o.matrices

    @property
    def mlp_matrices(self) -> tuple[Tensor | None, ...]:
        """A and B of all that gate_up and down have."""
        return *self.gate_up.matrices, *self.down.matrices


@dataclass(frozen=True)
class Places:
    """Where a layer's tokens are, and which of them it computes.

    Attributes:
        cos, sin: see `phinetune.engine.kernels.attention`.
        groups: the groups, the trees or the contexts of all segments of the row.
        rows: the tokens whose output is wanted, shape (labels); None: all.
    """

    cos: Tensor
    sin: Tensor
    groups: Groups | Trees | Contexts
    rows: Tensor | None


def layer(hidden: Tensor, parts: LayerParts, places: Places, level: Level) -> Tensor:
    """A layer's output.

    Args:
        hidden: shape (tokens, width).

    Returns:
        shape (tokens, width), or (labels, width) with `places.rows`.
    """
    adapters = (*parts.attention_matrices, *parts.mlp_matrices)
    out: Tensor = _Layer.apply(hidden, parts, places, level, *adapters)  # type: ignore[no-untyped-call]
    return out


@dataclass
class _AttentionHalf:
    """hidden + o(attention(qkv(norm(hidden)))), and its backward.

    Attributes:
        needs_hidden: whether hidden needs a gradient.
    """

    parts: LayerParts
    places: Places
    needs_hidden: bool
    normed: Tensor | None = None
    kept: list[Any] = field(default_factory=list)

    @property
    def needs_qkv(self) -> bool:
        return self.needs_hidden or self.parts.qkv.trains

    def forward(self, hidden: Tensor) -> Tensor:
        parts, places = self.parts, self.places
        self.normed, norm = parts.norms[0](hidden, self.needs_hidden, parts.qkv.room)
        qkv, first = parts.qkv(self.normed, self.needs_hidden, room.has(self.normed, parts.qkv.room))
        arguments = (qkv, places.cos, places.sin, places.groups, parts.heads, parts.o.room, parts.qkv.room)
        attended, attention = call(_Attention, *arguments, needs=(0,))
        if places.rows is not None:
            attended, hidden = attended.index_select(0, places.rows), hidden.index_select(0, places.rows)
        out, last = parts.o(attended, self.needs_qkv, room.has(attended, parts.o.room))
        self.kept = [norm, first, attention, last]
        return out.add_(hidden)

    def drop_cheap(self) -> None:
        """Do not keep the norm's output."""
        if self.normed is not None:
            self.kept[1].drop(self.normed)
            self.normed = None

    def backward(self, grad: Tensor) -> tuple[Tensor | None, list[Tensor | None]]:
        """The gradient of hidden, and those of `LayerParts.attention_matrices`."""
        norm, first, attention, last = self.kept
        parts, places = self.parts, self.places
        d_attended, of_o = parts.o.backward(last, grad)
        if not self.needs_qkv or d_attended is None:
            return None, [*[None] * len(parts.qkv.matrices), *of_o]
        tokens = len(places.cos)
        if places.rows is not None:
            d_attended = d_attended.new_zeros(tokens, d_attended.shape[1]).index_add_(0, places.rows, d_attended)
        d_qkv = attention.backward(d_attended)[0]
        del d_attended
        if self.normed is None and parts.qkv.keeps_input:
            hidden = norm.saved_tensors[0]
            first.restore(parts.norms[0](hidden, False)[0])
        self.normed = None
        d_normed, of_qkv = parts.qkv.backward(first, d_qkv, room.has(d_qkv, parts.qkv.room))
        if not self.needs_hidden:
            return None, [*of_qkv, *of_o]
        d_hidden = norm.backward(d_normed)[0]
        d_hidden = d_hidden.add_(grad) if places.rows is None else d_hidden.index_add_(0, places.rows, grad)
        return d_hidden, [*of_qkv, *of_o]


@dataclass
class _MLPHalf:
    """hidden + down(swiglu(gate_up(norm(hidden)))), and its backward.

    Attributes:
        needs_hidden: whether hidden needs a gradient.
    """

    parts: LayerParts
    needs_hidden: bool
    cheap: tuple[Tensor, Tensor] | None = None
    kept: list[Any] = field(default_factory=list)

    @property
    def needs_gate_up(self) -> bool:
        return self.needs_hidden or self.parts.gate_up.trains

    def forward(self, hidden: Tensor) -> Tensor:
        active = self._wide(hidden)
        out, last = self.parts.down(active, self.needs_gate_up, room.has(active, self.parts.down.room))
        self.kept.append(last)
        return out.add_(hidden)

    def prepare(self, hidden: Tensor) -> None:
        """What the forward keeps for the backward, without its last product."""
        active = self._wide(hidden)
        self.kept.append(self.parts.down.kept(active, self.needs_gate_up))

    def _wide(self, hidden: Tensor) -> Tensor:
        """SwiGLU's output, shape (tokens, intermediate size)."""
        parts = self.parts
        normed, norm = parts.norms[1](hidden, self.needs_hidden, parts.gate_up.room)
        gate_up, first = parts.gate_up(normed, self.needs_hidden, room.has(normed, parts.gate_up.room))
        active, swiglu = call(_SwiGLU, gate_up, parts.compile, parts.down.room, parts.gate_up.room, needs=(0,))
        self.kept, self.cheap = [norm, first, swiglu], (normed, active)
        return active

    def drop_cheap(self) -> None:
        """Do not keep the outputs of the norm and of SwiGLU."""
        if self.cheap is not None:
            self.kept[1].drop(self.cheap[0])
            self.kept[3].drop(self.cheap[1])
            self.cheap = None

    def backward(self, grad: Tensor) -> tuple[Tensor | None, list[Tensor | None]]:
        """The gradient of hidden, and those of `LayerParts.mlp_matrices`."""
        norm, first, swiglu, last = self.kept
        parts = self.parts
        if self.cheap is None and parts.down.keeps_input:
            last.restore(call(_SwiGLU, swiglu.saved_tensors[0], parts.compile, needs=())[0])
        if self.cheap is None and parts.gate_up.keeps_input:
            first.restore(parts.norms[1](norm.saved_tensors[0], False)[0])
        self.cheap = None
        d_active, of_down = parts.down.backward(last, grad)
        if not self.needs_gate_up:
            return None, [*[None] * len(parts.gate_up.matrices), *of_down]
        d_gate_up = swiglu.backward(d_active)[0]
        del d_active
        d_normed, of_gate_up = parts.gate_up.backward(first, d_gate_up, room.has(d_gate_up, parts.gate_up.room))
        if not self.needs_hidden:
            return None, [*of_gate_up, *of_down]
        return norm.backward(d_normed)[0].add_(grad), [*of_gate_up, *of_down]


class _Layer(torch.autograd.Function):
    """Keeps what its level says."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, parts: LayerParts, places: Places, level: Level, *adapters: Tensor | None
    ) -> Tensor:
        attention = _AttentionHalf(parts, places, ctx.needs_input_grad[0])
        between = attention.forward(hidden)
        needs_between = attention.needs_qkv or parts.o.trains
        if level is Level.LAYER:
            ctx.again = (parts, places, ctx.needs_input_grad[0], needs_between)
            ctx.save_for_backward(hidden)
            return _mlp_by_parts(between, parts, needs_between)
        mlp = _MLPHalf(parts, needs_between)
        out = mlp.forward(between)
        if level is Level.CHEAP:
            attention.drop_cheap()
            mlp.drop_cheap()
        ctx.halves = (attention, mlp)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if hasattr(ctx, "again"):
            d_hidden, grads = _backward_by_parts(grad, *ctx.saved_tensors, *ctx.again)
            return d_hidden, None, None, None, *grads
        if ctx.halves is None:
            raise RuntimeError("a layer's activations are gone after its backward; compute it again for another")
        (attention, mlp), ctx.halves = ctx.halves, None
        between, of_mlp = mlp.backward(grad)
        if between is None:
            d_hidden, of_attention = None, [None] * len(attention.parts.attention_matrices)
        else:
            d_hidden, of_attention = attention.backward(between)
        return d_hidden, None, None, None, *of_attention, *of_mlp


def _parts_of(rows: Tensor) -> Iterator[slice]:
    return row_slices(len(rows), 1, MLP_ROWS)


def _mlp_by_parts(hidden: Tensor, parts: LayerParts, needs_hidden: bool) -> Tensor:
    """The MLP half's output. Nothing is kept."""
    if len(hidden) <= MLP_ROWS:
        return _MLPHalf(parts, needs_hidden).forward(hidden)
    out = torch.empty_like(hidden)
    for rows in _parts_of(hidden):
        out[rows] = _MLPHalf(parts, needs_hidden).forward(hidden[rows])
    return out


def _backward_by_parts(
    grad: Tensor, hidden: Tensor, parts: LayerParts, places: Places, needs_hidden: bool, needs_between: bool
) -> tuple[Tensor | None, list[Tensor | None]]:
    """The gradient of hidden and those of all adapters. The layer is computed again, but for its last product."""
    attention = _AttentionHalf(parts, places, needs_hidden)
    between = attention.forward(hidden)
    d_between = torch.empty_like(between) if needs_between else None
    of_mlp: list[Tensor | None] = [None] * len(parts.mlp_matrices)
    for rows in _parts_of(between):
        mlp = _MLPHalf(parts, needs_between)
        mlp.prepare(between[rows])
        found, grads = mlp.backward(grad[rows])
        of_mlp = [_sum(total, more) for total, more in zip(of_mlp, grads, strict=True)]
        if d_between is not None and found is not None:
            d_between[rows] = found
    if d_between is None:
        return None, [*[None] * len(parts.attention_matrices), *of_mlp]
    del between
    d_hidden, of_attention = attention.backward(d_between)
    return d_hidden, [*of_attention, *of_mlp]


def _sum(total: Tensor | None, more: Tensor | None) -> Tensor | None:
    """Parts of a gradient are added up in float32."""
    return more if total is None or more is None else total.to(torch.promote_types(total.dtype, torch.float32)) + more
