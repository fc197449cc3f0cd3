"""The layers of a decoder with a second forward, for packed rows.

Called as usual, every class does what its parent does. Called with a packed row, a layer computes hidden states of
shape (tokens, width), without a batch dimension, with the functions of `phinetune.engine.kernels`. Attention stays
within segments, and backwards need little memory.

Models have these classes beside transformers' own as parents: `phi3` and `split_models`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.models.phi3 import modeling_phi3 as transformers_phi3

from phinetune.engine.activation_memory import Level
from phinetune.engine.attention_plan import AttentionRun, Heads
from phinetune.engine.families import FUSED
from phinetune.engine.kernels.attention import attention
from phinetune.engine.kernels.matmul import linear
from phinetune.engine.kernels.norm import rms_norm
from phinetune.engine.kernels.recompute import recomputed
from phinetune.engine.kernels.swiglu import swiglu
from phinetune.engine.layer_function import LayerParts, Norm, Places
from phinetune.engine.layer_function import layer as whole_layer
from phinetune.engine.lora_layers import projections
from phinetune.engine.q8_linear import ANSWERING


@dataclass(frozen=True)
class Packed:
    """What the layers need to know about a packed row; a `RowAttention`.

    Attributes:
        runs: how attention is computed; see `kernels.attention.planned`.
        cos, sin: shape (tokens, rotated features / 2), in the hidden states' dtype.
        predicts: positions whose output is used, shape (labels).
        levels: what each layer keeps for the backward.
        on_qkv: called with each layer's number and its qkv after queries and keys were rotated; None: not called.
    """

    runs: list[AttentionRun]
    cos: Tensor
    sin: Tensor
    predicts: Tensor
    levels: Sequence[Level]
    on_qkv: Callable[[int, Tensor], None] | None = None

    def attend(self, layer: int, qkv: Tensor, heads: Heads) -> Tensor:
        """Attention within the row's segments. Queries and keys in `qkv` are rotated in place."""
        out = attention(qkv, self.cos, self.sin, self.runs, heads)
        if self.on_qkv:
            self.on_qkv(layer, qkv)
        return out


class RowAttention(Protocol):
    """Knows what the tokens that pass through the layers, without a batch dimension, attend to."""

    def attend(self, layer: int, qkv: Tensor, heads: Heads) -> Tensor:
        """Compute attention in one layer.

        Args:
            layer: its number.
            qkv: shape (tokens, (heads + 2 · kv_heads) · size). Queries and keys are rotated in place.

        Returns:
            shape (tokens, heads · size).
        """


class Phi3RMSNorm(transformers_phi3.Phi3RMSNorm):
    """RMSNorm with a backward that needs little memory. It runs compiled if `compile_ops` is set."""

    compile_ops = False

    def forward(self, hidden_states: Tensor) -> Tensor:
        return rms_norm(hidden_states, self.weight, self.variance_epsilon, compile=self.compile_ops)


class PackedMLP(nn.Module):
    """Gate and up, SwiGLU, down_proj. For packed rows, `rebuild` drops SwiGLU's output and computes it again.

    Attributes:
        names: what its layers are called.
    """

    compile_ops = False
    names = FUSED
    down_proj: Any

    @property
    def inputs(self) -> tuple[nn.Module, ...]:
        """The layers whose outputs side by side are gate and up."""
        return tuple(getattr(self, name) for name in self.names.mlp)

    def forward(self, hidden_states: Tensor, packed: bool = False, rebuild: bool = False) -> Tensor:
        if not packed:
            return super().forward(hidden_states)  # type: ignore[no-any-return]
        gate_up = _side_by_side(self.inputs, hidden_states)
        activate = functools.partial(swiglu, compile=self.compile_ops)
        active = activate(gate_up)
        with _recomputed_if(rebuild, active, activate, gate_up):
            return called(self.down_proj, active)


def _side_by_side(layers: Sequence[nn.Module], x: Tensor) -> Tensor:
    """The outputs of layers over the same rows, side by side."""
    made = [called(layer, x) for layer in layers]
    return made[0] if len(made) == 1 else torch.cat(made, dim=-1)


def called(layer: nn.Module, x: Tensor) -> Tensor:
    """What a layer makes of x. Without a graph, a plain linear layer's product is that of `matmul.linear`."""
    if torch.is_grad_enabled() or _is_hooked(layer):
        return layer(x)  # type: ignore[no-any-return]
    if type(layer) is nn.Linear:
        return linear(x, layer.weight, layer.bias)
    # A step of answers calls a hundred of these, and torch's own call takes as long as a small one's product.
    return layer.forward(x) if type(layer) in ANSWERING else layer(x)  # type: ignore[no-any-return]


class PackedAttention(nn.Module):
    """q, k and v, attention, o_proj. For packed rows, o_proj is applied only at the positions `rows`, if given.

    Attributes:
        names: what its layers are called.
        window: how many keys a query sees; None: all before it.
    """

    names = FUSED
    window: int | None
    config: Any
    o_proj: Any
    layer_idx: int | None
    head_dim: int
    scaling: float

    @property
    def inputs(self) -> tuple[nn.Module, ...]:
        """The layers whose outputs side by side are q, k and v."""
        return tuple(getattr(self, name) for name in self.names.attention)

    def forward(
        self,
        hidden_states: Tensor,
        *args: Any,
        packed: RowAttention | None = None,
        rows: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        if packed is None:
            return super().forward(hidden_states, *args, **kwargs)
        qkv = _side_by_side(self.inputs, hidden_states)
        out = packed.attend(self.layer_idx or 0, qkv, self.heads)
        return called(self.o_proj, out if rows is None else out.index_select(0, rows))

    @property
    def heads(self) -> Heads:
        """How qkv is divided into heads."""
        config = self.config
        kv_heads = config.num_key_value_heads or config.num_attention_heads
        return Heads(config.num_attention_heads, kv_heads, self.head_dim, self.scaling, self.window)


class PackedLayer(nn.Module):
    """One decoder layer.

    For packed rows it maps hidden states (tokens, width) to (tokens, width), or to (labels, width) if `rows` is given,
    as it is for the last layer.
    """

    self_attn: Any
    mlp: Any
    input_layernorm: Any
    post_attention_layernorm: Any
    resid_attn_dropout: Any
    resid_mlp_dropout: Any

    def forward(
        self,
        hidden_states: Tensor,
        *args: Any,
        packed: RowAttention | None = None,
        rows: Tensor | None = None,
        level: Level = Level.KEEP,
        **kwargs: Any,
    ) -> Any:
        if packed is None:
            return super().forward(hidden_states, *args, **kwargs)
        places, parts = _places(packed, rows), None
        if places is not None:
            parts = self._parts(hidden_states.dtype)
        if places is not None and parts is not None:
            return whole_layer(hidden_states, parts, places, level)
        if level is Level.LAYER and torch.is_grad_enabled():
            return checkpoint(self._packed, hidden_states, packed, rows, False, use_reentrant=False)
        return self._packed(hidden_states, packed, rows, level is Level.CHEAP)

    def _parts(self, dtype: torch.dtype) -> LayerParts | None:
        """The parts that one function computes; None where the modules have to be called."""
        attention, mlp = self.self_attn, self.mlp
        norms: tuple[Any, Any] = (self.input_layernorm, self.post_attention_layernorm)
        modules = (attention.inputs, (attention.o_proj,), mlp.inputs, (mlp.down_proj,))
        called = (attention, mlp, *norms, *(module for some in modules for module in some))
        dropouts = (self.resid_attn_dropout, self.resid_mlp_dropout)
        if any(getattr(one, "p", 0) and one.training for one in dropouts) or any(_is_hooked(one) for one in called):
            return None
        if any(type(norm) is not Phi3RMSNorm or norm.weight.requires_grad for norm in norms):
            return None
        qkv, o, gate_up, down = (projections(some, dtype) for some in modules)
        if qkv is None or o is None or gate_up is None or down is None:
            return None
        before, after = (Norm(norm.weight, norm.variance_epsilon, norm.compile_ops) for norm in norms)
        return LayerParts((before, after), qkv, o, gate_up, down, attention.heads, mlp.compile_ops)

    def _packed(self, hidden: Tensor, packed: RowAttention, rows: Tensor | None, rebuild: bool) -> Tensor:
        normed = self.input_layernorm(hidden)
        with _recomputed_if(rebuild, normed, self.input_layernorm, hidden):
            attended = self.self_attn(normed, packed=packed, rows=rows)
        del normed
        hidden = hidden if rows is None else hidden.index_select(0, rows)
        hidden = hidden + self.resid_attn_dropout(attended)
        normed = self.post_attention_layernorm(hidden)
        with _recomputed_if(rebuild, normed, self.post_attention_layernorm, hidden):
            fed = self.mlp(normed, packed=True, rebuild=rebuild)
        return hidden + self.resid_mlp_dropout(fed)  # type: ignore[no-any-return]


def _places(packed: RowAttention, rows: Tensor | None) -> Places | None:
    """Where the tokens of a step that trains are, if one function can compute a layer of it; else None."""
    if not isinstance(packed, Packed) or packed.on_qkv or not torch.is_grad_enabled():
        return None
    if len(packed.runs) > 1 or packed.runs[0].groups is None or torch.is_autocast_enabled(packed.cos.device.type):
        return None
    return Places(packed.cos, packed.sin, packed.runs[0].groups, rows)


def _is_hooked(module: nn.Module) -> bool:
    """Whether someone asked to be told when a module is called, or replaced its forward."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks) or "forward" in module.__dict__


def _recomputed_if(rebuild: bool, tensor: Tensor, make: Callable[[Tensor], Tensor], source: Tensor) -> Any:
    """A context in which functions that save `tensor` for their backward save `source` instead, if `rebuild` is true.

    In the backward, `make(source)` computes the tensor again.
    """
    if not rebuild:
        return nullcontext()
    return recomputed(tensor, functools.partial(make, source.detach()))
