"""transformers' Phi-3 with a second forward, for packed rows. Modules and state dict are the same.

Called as usual, every class does what its parent does. Called with a packed row, the decoder computes hidden states of
shape (tokens, width), without a batch dimension, with the functions of `phinetune.engine.kernels`. Attention stays
within segments, backwards need little memory, and the head is applied only at positions that predict a label.

The packed forwards stand in classes of their own (`Packed…`), since other models have them too: `split_models`.
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
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.phi3 import modeling_phi3 as transformers_phi3

from phinetune.engine.activation_memory import Level
from phinetune.engine.attention_plan import AttentionRun, Heads
from phinetune.engine.families import FUSED
from phinetune.engine.kernels import rotary
from phinetune.engine.kernels.attention import attention, planned
from phinetune.engine.kernels.cross_entropy import linear_cross_entropy, linear_label_numbers, linear_log_probs
from phinetune.engine.kernels.norm import rms_norm
from phinetune.engine.kernels.recompute import recomputed
from phinetune.engine.kernels.swiglu import swiglu
from phinetune.engine.layer_function import LayerParts, Norm, Places
from phinetune.engine.layer_function import layer as whole_layer
from phinetune.engine.lora_layers import projections
from phinetune.engine.outputs import ConversationOutput, PackedOutput
from phinetune.engine.segments import Segment, read_segments

# Rope types whose frequencies do not depend on a conversation's length.
STATIC_ROPE = ("default", "linear", "yarn", "llama3")


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


def missing_form(config: Any) -> str | None:
    """What in a model's configuration keeps it from having a packed form; None if it has one."""
    if config.hidden_act not in ("silu", "swish"):
        return f"hidden_act `{config.hidden_act}`"
    if config.attention_dropout:
        return "attention_dropout"
    if config.rope_parameters["rope_type"] not in (*STATIC_ROPE, "longrope"):
        return f"rope type `{config.rope_parameters['rope_type']}`"
    if len(set(getattr(config, "layer_types", None) or ())) > 1:
        return "layer_types that differ"
    return None


def rope_limit(config: Any) -> int | None:
    """The length in tokens up to which a conversation rotates by longrope's short factors; None without longrope."""
    rope = config.rope_parameters
    return int(rope["original_max_position_embeddings"]) if rope["rope_type"] == "longrope" else None


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
            return self.down_proj(active)  # type: ignore[no-any-return]


class Phi3MLP(PackedMLP, transformers_phi3.Phi3MLP):
    """gate_up_proj, SwiGLU, down_proj."""


def _side_by_side(layers: Sequence[nn.Module], x: Tensor) -> Tensor:
    """The outputs of layers over the same rows, side by side."""
    return layers[0](x) if len(layers) == 1 else torch.cat([layer(x) for layer in layers], dim=-1)


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
        return self.o_proj(out if rows is None else out.index_select(0, rows))

    @property
    def heads(self) -> Heads:
        """How qkv is divided into heads."""
        config = self.config
        kv_heads = config.num_key_value_heads or config.num_attention_heads
        return Heads(config.num_attention_heads, kv_heads, self.head_dim, self.scaling, self.window)


class Phi3Attention(PackedAttention, transformers_phi3.Phi3Attention):
    """qkv_proj, attention, o_proj."""

    @property
    def window(self) -> int | None:  # type: ignore[override]
        return getattr(self.config, "sliding_window", None)


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


class Phi3DecoderLayer(PackedLayer, transformers_phi3.Phi3DecoderLayer):
    """One decoder layer of Phi-3."""

    def __init__(self, config: Any, layer_idx: int) -> None:
        nn.Module.__init__(self)
        self.hidden_size = config.hidden_size
        self.self_attn = Phi3Attention(config=config, layer_idx=layer_idx)
        self.mlp = Phi3MLP(config)  # type: ignore[no-untyped-call]
        self.input_layernorm = Phi3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = Phi3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.config = config
        self.resid_attn_dropout = nn.Dropout(config.resid_pdrop)
        self.resid_mlp_dropout = nn.Dropout(config.resid_pdrop)


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


class PackedDecoder(nn.Module):
    """The decoder.

    Attributes:
        activation_levels: given a row's number of tokens, returns what each layer keeps for the backward. None: all.
    """

    activation_levels: Callable[[int], Sequence[Level]] | None = None
    config: Any
    embed_tokens: Any
    layers: nn.ModuleList
    norm: Any
    rotary_emb: Any

    def compile_operators(self) -> None:
        """From now on, run norms and SwiGLU compiled."""
        for module in self.modules():
            if isinstance(module, (Phi3RMSNorm, PackedMLP)):
                module.compile_ops = True

    def packed(
        self,
        input_ids: Tensor,
        positions: Tensor,
        segments: Tensor,
        predicts: Tensor,
        on_qkv: Callable[[int, Tensor], None] | None = None,
    ) -> Tensor:
        """The decoder's output for a packed row, after the last norm.

        Args:
            input_ids, positions: shape (tokens).
            segments: shape (segments, 3), see `phinetune.engine.segments`.
            predicts: positions whose output is wanted, shape (labels).
            on_qkv: see `Packed`.

        Returns:
            shape (labels, width).
        """
        hidden = self.embed_tokens(input_ids)
        parts = read_segments(segments)
        cos, sin = self._rotation(positions, parts)
        levels = self._levels(len(positions))
        first: Any = self.layers[0]
        runs = planned(segments, parts, first.self_attn.heads, hidden)
        row = Packed(runs, cos.to(hidden.dtype), sin.to(hidden.dtype), predicts, levels, on_qkv)
        last = len(self.layers) - 1
        for i, layer in enumerate(self.layers):
            hidden = layer(hidden, packed=row, rows=predicts if i == last else None, level=levels[i])
        return self.norm(hidden)  # type: ignore[no-any-return]

    def step(self, input_ids: Tensor, row: RowAttention) -> Tensor:
        """The decoder's output for the next token of each conversation, after the last norm.

        Args:
            input_ids: shape (conversations).
            row: attends to the tokens before.

        Returns:
            shape (conversations, width).
        """
        hidden = self.embed_tokens(input_ids)
        for layer in self.layers:
            hidden = layer(hidden, packed=row)
        return self.norm(hidden)  # type: ignore[no-any-return]

    def _levels(self, tokens: int) -> Sequence[Level]:
        if self.activation_levels is None or not torch.is_grad_enabled():
            return [Level.KEEP] * len(self.layers)
        return self.activation_levels(tokens)

    def _rotation(self, positions: Tensor, segments: Sequence[Segment]) -> tuple[Tensor, Tensor]:
        """cos and sin. Conversations beyond longrope's first limit get its long factors, together with their tree."""
        cos, sin = self.rotation(positions, long=False)
        limit = rope_limit(self.config)
        if limit is None:
            return cos, sin
        for start, stop in _trees(segments):
            if int(positions[start:stop].max()) >= limit:
                cos[start:stop], sin[start:stop] = self.rotation(positions[start:stop], long=True)
        return cos, sin

    def rotation(self, positions: Tensor, *, long: bool) -> tuple[Tensor, Tensor]:
        """cos and sin, each of shape (tokens, m) in float32. `long` takes longrope's long factors."""
        emb = self.rotary_emb
        frequencies: Tensor = emb.original_inv_freq
        if long:
            limit = rope_limit(emb.config) or 0
            frequencies, _ = ROPE_INIT_FUNCTIONS["longrope"](emb.config, positions.device, seq_len=limit + 1)
        return rotary.tables(frequencies, positions, emb.attention_scaling)


class Phi3Model(PackedDecoder, transformers_phi3.Phi3Model):
    """The decoder of Phi-3."""

    def __init__(self, config: Any) -> None:
        transformers_phi3.Phi3PreTrainedModel.__init__(self, config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList([Phi3DecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = Phi3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = transformers_phi3.Phi3RotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()  # type: ignore[no-untyped-call]


def _trees(segments: Sequence[Segment]) -> list[tuple[int, int]]:
    """The range of tokens of each tree: a root with all its branches."""
    starts = [segment.start for segment in segments if not segment.above]
    return list(zip(starts, [*starts[1:], segments[-1].stop], strict=True))


class PackedCausalLM(nn.Module):
    """A decoder and its head. Called with `segments`, it takes a packed row and returns a loss or log-probabilities."""

    model: Any
    config: Any
    device: Any
    dtype: Any
    get_output_embeddings: Callable[[], Any]

    def forward(self, *args: Any, segments: Tensor | None = None, **kwargs: Any) -> Any:
        """Without `segments`, what the parent does. With `segments`, the loss of a packed row (see `packed_loss`), or
        with `owners` too the log-probabilities of its conversations (see `packed_log_probs`).
        """
        if segments is None:
            return super().forward(*args, **kwargs)
        owned = kwargs.get("owners") is not None
        given = ("input_ids", "position_ids", "predicts", "labels")
        more = ("owners", "conversations") if owned else ("weights",)
        chosen = {key: kwargs[key] for key in (*given, *more)}
        if owned:
            chosen["spread"] = kwargs.get("spread", False)
        return (self.packed_log_probs if owned else self.packed_loss)(segments=segments, **chosen)

    def packed_loss(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        segments: Tensor,
        predicts: Tensor,
        labels: Tensor,
        weights: Tensor,
    ) -> PackedOutput:
        """The summed loss of a packed row.

        Args:
            input_ids, position_ids: shape (1, tokens).
            segments: shape (segments, 3), see `phinetune.engine.segments`.
            predicts: for each label the position whose output predicts it, shape (labels).
            labels: token ids, shape (labels).
            weights: how many conversations share each label, shape (labels), float32.
        """
        hidden = self.model.packed(input_ids[0], position_ids[0], segments, predicts)
        nll, correct = linear_cross_entropy(hidden, self._head_weight, labels, weights)
        return PackedOutput(nll=nll, correct=correct, count=weights.sum())

    def packed_log_probs(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        segments: Tensor,
        predicts: Tensor,
        labels: Tensor,
        owners: Tensor,
        conversations: Tensor,
        spread: bool = False,
    ) -> ConversationOutput:
        """The summed log-probabilities of each conversation in a packed row.

        Args:
            input_ids, position_ids, segments, predicts, labels: see `packed_loss`.
            owners: pairs of a label's index and the number of a conversation that has this label, shape (pairs, 2); see
                `phinetune.engine.packing`. A label that several conversations share counts for each of them.
            conversations: how many conversations there are, a scalar.
            spread: whether to give `entropy` and `logits` too, which reads the logits once more.
        """
        hidden = self.model.packed(input_ids[0], position_ids[0], segments, predicts)
        numbers = (linear_label_numbers if spread else linear_log_probs)(hidden, self._head_weight, labels)
        place, owner = owners.unbind(1)
        zeros = torch.zeros(int(conversations), dtype=torch.float32, device=hidden.device)

        def sums(one: Tensor) -> Tensor:
            return zeros.index_add(0, owner, one[place])

        log_probs, first, *more = (sums(one) for one in numbers)
        count = sums(torch.ones_like(numbers[1]))
        return ConversationOutput(log_probs, first, count, *more)

    @property
    def _head_weight(self) -> Tensor:
        weight: Tensor = self.get_output_embeddings().weight
        return weight


class Phi3ForCausalLM(PackedCausalLM, transformers_phi3.Phi3ForCausalLM):
    """transformers' Phi-3, which takes packed rows too."""

    def __init__(self, config: Any) -> None:
        transformers_phi3.Phi3PreTrainedModel.__init__(self, config)
        self.model = Phi3Model(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()  # type: ignore[no-untyped-call]

    @functools.wraps(transformers_phi3.Phi3ForCausalLM.forward)  # `generate` reads the parent's signature
    def forward(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        return super().forward(*args, **kwargs)
