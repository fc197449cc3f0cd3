"""transformers' Phi-3 with a second way through it, for packed rows: same modules, same state dict.

Called as usual, every class here does what its parent does. Called with a `Packed` row, the decoder runs on
(tokens, width) without a batch dimension through `phinetune.engine.kernels`: attention within segments, small
backwards, the head only where there is a label.
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
from transformers.models.phi3 import modeling_phi3 as plain
from transformers.utils import ModelOutput

from phinetune.engine.attention_plan import AttentionRun, Heads, plan
from phinetune.engine.kernels import rotary
from phinetune.engine.kernels.attention import attention
from phinetune.engine.kernels.cross_entropy import linear_cross_entropy
from phinetune.engine.kernels.norm import rms_norm
from phinetune.engine.kernels.recompute import rebuilt
from phinetune.engine.kernels.swiglu import swiglu
from phinetune.engine.memory import Level
from phinetune.engine.rows import Segment, read_segments

STATIC_ROPE = ("default", "linear", "yarn", "llama3")


@dataclass
class PackedOutput(ModelOutput):
    """Sums over a packed row's labels, each weighed by the rows it stands for; float32 scalars.

    Attributes:
        nll: negative log-likelihood, in nats.
        correct: labels that were the model's first choice.
        count: labels.
    """

    nll: Tensor | None = None
    correct: Tensor | None = None
    count: Tensor | None = None


@dataclass(frozen=True)
class Packed:
    """What every layer needs to know of a packed row.

    Attributes:
        cos, sin: shape (tokens, rotated features / 2), in the hidden states' dtype.
        predicts: positions whose output is used at all, shape (labels).
        levels: what each layer keeps for the backward.
        keep: given each layer's number and its qkv with queries and keys rotated, as soon as it is there.
    """

    runs: list[AttentionRun]
    cos: Tensor
    sin: Tensor
    predicts: Tensor
    levels: Sequence[Level]
    keep: Callable[[int, Tensor], None] | None = None

    def attend(self, layer: int, qkv: Tensor, heads: Heads) -> Tensor:
        """Attention within the row's segments; `qkv` is rotated in place."""
        out = attention(qkv, self.cos, self.sin, self.runs, heads)
        if self.keep:
            self.keep(layer, qkv)
        return out


class RowAttention(Protocol):
    """Tokens on their way through the layers without a batch dimension, and what they attend to."""

    def attend(self, layer: int, qkv: Tensor, heads: Heads) -> Tensor:
        """From (tokens, (heads + 2 · kv_heads) · size), which is rotated in place, to (tokens, heads · size)."""


def missing_form(config: Any) -> str | None:
    """Why this model has no packed form; None if it has one."""
    if config.hidden_act not in ("silu", "swish"):
        return f"hidden_act `{config.hidden_act}`"
    if config.attention_dropout:
        return "attention_dropout"
    if config.rope_parameters["rope_type"] not in (*STATIC_ROPE, "longrope"):
        return f"rope type `{config.rope_parameters['rope_type']}`"
    return None


def rope_limit(config: Any) -> int | None:
    """Tokens up to which a conversation takes longrope's short factors; None without longrope."""
    rope = config.rope_parameters
    return int(rope["original_max_position_embeddings"]) if rope["rope_type"] == "longrope" else None


class Phi3RMSNorm(plain.Phi3RMSNorm):
    """The norm with a small backward; `compile_ops` runs it compiled."""

    compile_ops = False

    def forward(self, hidden_states: Tensor) -> Tensor:
        return rms_norm(hidden_states, self.weight, self.variance_epsilon, compile=self.compile_ops)


class Phi3MLP(plain.Phi3MLP):
    """gate_up_proj, SwiGLU, down_proj; the packed way can drop SwiGLU's output and compute it again."""

    compile_ops = False

    def forward(self, hidden_states: Tensor, packed: bool = False, rebuild: bool = False) -> Tensor:
        if not packed:
            return super().forward(hidden_states)
        gate_up = self.gate_up_proj(hidden_states)
        activate = functools.partial(swiglu, compile=self.compile_ops)
        active = activate(gate_up)
        with _lighter(rebuild, active, activate, gate_up):
            return self.down_proj(active)  # type: ignore[no-any-return]


class Phi3Attention(plain.Phi3Attention):
    """qkv_proj, attention within segments, o_proj; `rows` limits the last to positions that are used."""

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
        qkv = self.qkv_proj(hidden_states)
        out = packed.attend(self.layer_idx or 0, qkv, self.heads)
        return self.o_proj(out if rows is None else out.index_select(0, rows))

    @property
    def heads(self) -> Heads:
        config = self.config
        window = getattr(config, "sliding_window", None)
        kv_heads = config.num_key_value_heads or config.num_attention_heads
        return Heads(config.num_attention_heads, kv_heads, self.head_dim, self.scaling, window)


class Phi3DecoderLayer(plain.Phi3DecoderLayer):
    """One layer; packed: (tokens, width) in, (tokens, width) or, in the last layer, (labels, width) out."""

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
        if level is Level.LAYER and torch.is_grad_enabled():
            return checkpoint(self._packed, hidden_states, packed, rows, False, use_reentrant=False)
        return self._packed(hidden_states, packed, rows, level is Level.CHEAP)

    def _packed(self, hidden: Tensor, packed: RowAttention, rows: Tensor | None, rebuild: bool) -> Tensor:
        normed = self.input_layernorm(hidden)
        with _lighter(rebuild, normed, self.input_layernorm, hidden):
            attended = self.self_attn(normed, packed=packed, rows=rows)
        del normed
        hidden = hidden if rows is None else hidden.index_select(0, rows)
        hidden = hidden + self.resid_attn_dropout(attended)
        normed = self.post_attention_layernorm(hidden)
        with _lighter(rebuild, normed, self.post_attention_layernorm, hidden):
            fed = self.mlp(normed, packed=True, rebuild=rebuild)
        return hidden + self.resid_mlp_dropout(fed)  # type: ignore[no-any-return]


def _lighter(rebuild: bool, tensor: Tensor, make: Callable[[Tensor], Tensor], source: Tensor) -> Any:
    """Inside, what saves `tensor` keeps its source in its place, if `rebuild` says so."""
    if not rebuild:
        return nullcontext()
    return rebuilt(tensor, functools.partial(make, source.detach()))


class Phi3Model(plain.Phi3Model):
    """The decoder. `activation_levels` says for a number of tokens what each layer keeps for the backward."""

    def __init__(self, config: Any) -> None:
        plain.Phi3PreTrainedModel.__init__(self, config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList([Phi3DecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = Phi3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = plain.Phi3RotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.activation_levels: Callable[[int], Sequence[Level]] | None = None
        self.post_init()  # type: ignore[no-untyped-call]

    def compile_operators(self) -> None:
        """Run norms and SwiGLU compiled from now on."""
        for module in self.modules():
            if isinstance(module, (Phi3RMSNorm, Phi3MLP)):
                module.compile_ops = True

    def packed(
        self,
        input_ids: Tensor,
        positions: Tensor,
        segments: Tensor,
        predicts: Tensor,
        keep: Callable[[int, Tensor], None] | None = None,
    ) -> Tensor:
        """Normed hidden states at the positions `predicts`: shape (labels, width). See `Phi3ForCausalLM.packed_loss`.

        Args:
            keep: see `Packed`.
        """
        hidden = self.embed_tokens(input_ids)
        parts = read_segments(segments)
        cos, sin = self._rotation(positions, parts)
        levels = self._levels(len(positions))
        first: Any = self.layers[0]
        runs = plan(parts, first.self_attn.heads, hidden.dtype, hidden.device)
        row = Packed(runs, cos.to(hidden.dtype), sin.to(hidden.dtype), predicts, levels, keep)
        last = len(self.layers) - 1
        for i, layer in enumerate(self.layers):
            hidden = layer(hidden, packed=row, rows=predicts if i == last else None, level=levels[i])
        return self.norm(hidden)  # type: ignore[no-any-return]

    def step(self, input_ids: Tensor, row: RowAttention) -> Tensor:
        """Normed hidden states of one token a conversation, shape (conversations, width); `row` knows what was."""
        hidden = self.embed_tokens(input_ids)
        for layer in self.layers:
            hidden = layer(hidden, packed=row)
        return self.norm(hidden)  # type: ignore[no-any-return]

    def _levels(self, tokens: int) -> Sequence[Level]:
        if self.activation_levels is None or not torch.is_grad_enabled():
            return [Level.KEEP] * len(self.layers)
        return self.activation_levels(tokens)

    def _rotation(self, positions: Tensor, segments: Sequence[Segment]) -> tuple[Tensor, Tensor]:
        """cos and sin; longrope takes its long factors for the conversations that are longer than its first limit."""
        cos, sin = self.rotation(positions, long=False)
        limit = rope_limit(self.config)
        if limit is None:
            return cos, sin
        for start, stop in _trees(segments):
            if int(positions[start:stop].max()) >= limit:
                cos[start:stop], sin[start:stop] = self.rotation(positions[start:stop], long=True)
        return cos, sin

    def rotation(self, positions: Tensor, *, long: bool) -> tuple[Tensor, Tensor]:
        """cos and sin, each (tokens, m) in float32; `long`: by longrope's long factors."""
        emb = self.rotary_emb
        frequencies: Tensor = emb.original_inv_freq
        if long:
            limit = rope_limit(emb.config) or 0
            frequencies, _ = ROPE_INIT_FUNCTIONS["longrope"](emb.config, positions.device, seq_len=limit + 1)
        return rotary.tables(frequencies, positions, emb.attention_scaling)


def _trees(segments: Sequence[Segment]) -> list[tuple[int, int]]:
    """The token ranges of roots with all that branches from them."""
    starts = [segment.start for segment in segments if not segment.above]
    return list(zip(starts, [*starts[1:], segments[-1].stop], strict=True))


class Phi3ForCausalLM(plain.Phi3ForCausalLM):
    """transformers' Phi-3; with `segments` it takes a packed row and gives the loss."""

    def __init__(self, config: Any) -> None:
        plain.Phi3PreTrainedModel.__init__(self, config)
        self.model = Phi3Model(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()  # type: ignore[no-untyped-call]

    @functools.wraps(plain.Phi3ForCausalLM.forward)  # `generate` reads the parent's signature
    def forward(self, *args: Any, segments: Tensor | None = None, **kwargs: Any) -> Any:  # type: ignore[override]
        """As the parent; or, with `segments`, the loss of a packed row (see `packed_loss`)."""
        if segments is None:
            return super().forward(*args, **kwargs)
        given = ("input_ids", "position_ids", "predicts", "labels", "weights")
        return self.packed_loss(segments=segments, **{key: kwargs[key] for key in given})

    def packed_loss(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        segments: Tensor,
        predicts: Tensor,
        labels: Tensor,
        weights: Tensor,
    ) -> PackedOutput:
        """Summed loss of a packed row.

        Args:
            input_ids, position_ids: shape (1, tokens).
            segments: see `phinetune.engine.rows`, shape (segments, 3).
            predicts: the position whose output predicts a label, shape (labels).
            labels: token ids, shape (labels).
            weights: how many rows a label stands for, shape (labels), float32.
        """
        hidden = self.model.packed(input_ids[0], position_ids[0], segments, predicts)
        head: Any = self.get_output_embeddings()  # type: ignore[no-untyped-call]
        nll, correct = linear_cross_entropy(hidden, head.weight, labels, weights)
        return PackedOutput(nll=nll, correct=correct, count=weights.sum())
