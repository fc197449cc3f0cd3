"""transformers' Phi-3 with a second forward, for packed rows: `packed_layers`, `packed_model`.

Modules and state dict are the same as transformers'.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import nn
from transformers.models.phi3 import modeling_phi3 as transformers_phi3

from phinetune.engine.packed_layers import PackedAttention, PackedLayer, PackedMLP, Phi3RMSNorm
from phinetune.engine.packed_model import PackedCausalLM, PackedDecoder

# Rope types whose frequencies do not depend on a conversation's length.
STATIC_ROPE = ("default", "linear", "yarn", "llama3")


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


class Phi3MLP(PackedMLP, transformers_phi3.Phi3MLP):
    """gate_up_proj, SwiGLU, down_proj."""


class Phi3Attention(PackedAttention, transformers_phi3.Phi3Attention):
    """qkv_proj, attention, o_proj."""

    @property
    def window(self) -> int | None:  # type: ignore[override]
        return getattr(self.config, "sliding_window", None)


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
