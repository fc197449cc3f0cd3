"""Llama, Mistral and Qwen2 with the packed forward of Phi-3. Modules and state dict are transformers' own.

Their layers are those of Phi-3, except that q, k, v and gate, up are layers of their own. They stay apart here, each
with its own adapter, so names, numbers and what is saved are those of the checkpoint.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from phinetune.engine.families import NAMES, SPLIT
from phinetune.engine.packed_layers import PackedAttention, PackedLayer, PackedMLP, Phi3RMSNorm
from phinetune.engine.packed_model import PackedCausalLM, PackedDecoder

WINDOWED = ("mistral", "qwen2")  # those whose attention has the configuration's `sliding_window`


class _MLP(PackedMLP):
    names = SPLIT


class _Attention(PackedAttention):
    names = SPLIT

    @property
    def window(self) -> int | None:  # type: ignore[override]
        window: int | None = self.config.sliding_window if self.config.model_type in WINDOWED else None
        return window


class _Layer(PackedLayer):
    """
    Attributes:
        attention_class, mlp_class: of its parts.
    """

    attention_class: Any
    mlp_class: Any
    resid_attn_dropout = resid_mlp_dropout = nn.Identity()

    def __init__(self, config: Any, layer_idx: int) -> None:
        nn.Module.__init__(self)
        self.hidden_size = config.hidden_size
        self.self_attn = self.attention_class(config=config, layer_idx=layer_idx)
        self.mlp = self.mlp_class(config)
        self.input_layernorm = Phi3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = Phi3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)


class _Decoder(PackedDecoder):
    """
    Attributes:
        layer_class, rotary_class: of its parts.
        pretrained_class: transformers' class from which all models of the family come.
    """

    layer_class: Any
    rotary_class: Any
    pretrained_class: Any

    def __init__(self, config: Any) -> None:
        self.pretrained_class.__init__(self, config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList([self.layer_class(config, i) for i in range(config.num_hidden_layers)])
        self.norm = Phi3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = self.rotary_class(config=config)
        self.gradient_checkpointing = False
        if config.model_type == "qwen2":
            self.has_sliding_layers = "sliding_attention" in config.layer_types
        self.post_init()  # type: ignore[operator]


class _CausalLM(PackedCausalLM):
    """
    Attributes:
        decoder_class, pretrained_class: as in `_Decoder`.
    """

    decoder_class: Any
    pretrained_class: Any

    def __init__(self, config: Any) -> None:
        self.pretrained_class.__init__(self, config)
        self.model = self.decoder_class(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()  # type: ignore[operator]


@functools.cache
def packed_class(model_type: str) -> type[PreTrainedModel]:
    """The class of a family's model with its head. Its parts are classes of the same names as transformers'."""
    name = NAMES[model_type]
    theirs = vars(importlib.import_module(f"transformers.models.{model_type}.modeling_{model_type}"))
    pretrained = theirs[f"{name}PreTrainedModel"]

    def kind(own: type, part: str, **attributes: Any) -> Any:
        parent = theirs[name + part]
        return type(parent.__name__, (own, parent), {"__module__": __name__, "__doc__": parent.__doc__, **attributes})

    layer = kind(_Layer, "DecoderLayer", attention_class=kind(_Attention, "Attention"), mlp_class=kind(_MLP, "MLP"))
    rotary = theirs[f"{name}RotaryEmbedding"]
    decoder = kind(_Decoder, "Model", layer_class=layer, rotary_class=rotary, pretrained_class=pretrained)

    @functools.wraps(theirs[f"{name}ForCausalLM"].forward)  # `generate` reads the parent's signature
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return PackedCausalLM.forward(self, *args, **kwargs)

    model: type[PreTrainedModel] = kind(
        _CausalLM, "ForCausalLM", decoder_class=decoder, pretrained_class=pretrained, forward=forward
    )
    return model
