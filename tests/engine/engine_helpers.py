"""Plain transformers with plain PEFT, and the engine, holding the same weights and run on the same rows."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig, MistralConfig, Phi3Config, Qwen2Config

from helpers import SHARED
from phinetune.engine.activation_memory import Level
from phinetune.engine.choice import model_class
from phinetune.engine.examples import IGNORED, Encoded
from phinetune.engine.families import ModelConfig, transformers_class
from phinetune.engine.lora_layers import use_fused_layers
from phinetune.engine.packed_model import rope_limit
from phinetune.engine.packing import pack

# Weights ten times as wide as at a true start, so that attention is anything but even.
SMALL: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.25,
}
LORA: dict[str, Any] = {
    "r": 4,
    "lora_alpha": 8,
    "target_modules": "all-linear",
    "task_type": "CAUSAL_LM",
    "init_lora_weights": False,  # B is not zero
}
LIMIT = 32  # tokens, from which the shrunk hub configurations rotate by their long factors


def small_config(**changes: Any) -> Phi3Config:
    """Two layers, 32 wide; as Phi-3 mini unless changed."""
    return Phi3Config(**{**SMALL, **changes})


def hub_config(name: str, heads: int, kv_heads: int, **changes: Any) -> Phi3Config:
    """A hub checkpoint's configuration with its words kept and its sizes shrunk to heads of width 8."""
    file = SHARED / "hub-configs" / f"{name}.json"
    if not file.is_file():
        pytest.skip(f"the hub's configuration is not at {file}")
    tree = json.loads(file.read_text())
    tree.pop("auto_map")
    assert tree["num_attention_heads"] * kv_heads == tree["num_key_value_heads"] * heads
    stretch = tree["max_position_embeddings"] // tree["original_max_position_embeddings"]
    tree |= SMALL | {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "hidden_size": 8 * heads}
    tree |= {"original_max_position_embeddings": LIMIT, "max_position_embeddings": LIMIT * stretch}
    half = int(8 * tree.get("partial_rotary_factor", 1.0)) // 2
    for key in ("short_factor", "long_factor"):
        factors = tree["rope_scaling"][key]
        tree["rope_scaling"][key] = factors[len(factors) // half - 1 :: len(factors) // half]  # of all sizes
    return Phi3Config.from_dict({**tree, **changes})


def phi3_mini(**changes: Any) -> Phi3Config:
    return small_config(**changes)


def phi35_mini(**changes: Any) -> Phi3Config:
    """Longrope whose two sets of factors differ."""
    return hub_config("phi-3.5-mini-instruct", 4, 4, **changes)


def phi4_mini(**changes: Any) -> Phi3Config:
    """Grouped queries, heads rotated in part, one matrix for embedding and head, longrope."""
    return hub_config("phi-4-mini-instruct", 6, 2, **changes)


def windowed(**changes: Any) -> Phi3Config:
    """Keys shared by two queries, and no key further back than 24 tokens."""
    return small_config(sliding_window=24, num_key_value_heads=2, **changes)


def llama3(**changes: Any) -> LlamaConfig:
    """Frequencies scaled as in Llama 3.1, keys shared by two queries, heads that do not divide the width."""
    rope = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "original_max_position_embeddings": 32}
    rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    sizes = {"num_key_value_heads": 2, "head_dim": 12, "max_position_embeddings": 256, "rope_parameters": rope}
    return LlamaConfig(**{**SMALL, **sizes, "tie_word_embeddings": True, **changes})


def biased_llama(**changes: Any) -> LlamaConfig:
    """Biases everywhere, as the configuration allows."""
    return LlamaConfig(**{**SMALL, "attention_bias": True, "mlp_bias": True, **changes})


def longrope_llama(**changes: Any) -> LlamaConfig:
    """Phi-3.5 mini in Llama's form."""
    rope = dict(phi35_mini().rope_parameters or {})
    return LlamaConfig(**{**SMALL, "max_position_embeddings": 32 * LIMIT, "rope_parameters": rope, **changes})


def mistral(**changes: Any) -> MistralConfig:
    """Phi-3 mini in Mistral's form: no key further back than 24 tokens."""
    return MistralConfig(**{**SMALL, "num_key_value_heads": 4, "sliding_window": 24, **changes})


def qwen2(**changes: Any) -> Qwen2Config:
    """Biases on q, k and v alone, and one matrix for embedding and head."""
    return Qwen2Config(**{**SMALL, "num_key_value_heads": 2, "tie_word_embeddings": True, **changes})


def windowed_qwen2(**changes: Any) -> Qwen2Config:
    return qwen2(**{"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 0, **changes})


# Models whose q, k, v and gate, up are layers of their own.
SPLIT = {
    "llama 3": llama3,
    "llama with biases": biased_llama,
    "phi-3.5 as llama": longrope_llama,
    "mistral": mistral,
    "qwen2": qwen2,
    "qwen2 with a window": windowed_qwen2,
}
SHAPES = {"phi-3-mini": phi3_mini, "phi-3.5-mini": phi35_mini, "phi-4-mini": phi4_mini, "window": windowed}


@dataclass(frozen=True)
class Pair:
    """The same weights in transformers' classes under plain PEFT, and in the engine's."""

    plain: PeftModel
    fast: PeftModel

    def to(self, device: str) -> Pair:
        return Pair(self.plain.to(device), self.fast.to(device))


def make_pair(config: ModelConfig, dtype: torch.dtype = torch.float32, seed: int = 0, **lora: Any) -> Pair:
    """Both models, by default with one adapter on every linear layer."""
    torch.manual_seed(seed)
    bases = [
        kind._from_config(config, dtype=dtype, attn_implementation="sdpa")
        for kind in (transformers_class(config), model_class(config, fast=True))
    ]
    with torch.no_grad():
        for name, parameter in bases[0].named_parameters():
            if name.endswith("norm.weight"):
                parameter.uniform_(0.5, 1.5)  # at the start they are all one
            elif name.endswith("bias"):
                parameter.uniform_(-1, 1)  # at the start they are zero
    bases[1].load_state_dict(bases[0].state_dict())
    settings = {**LORA, **lora}
    plain = get_peft_model(bases[0], LoraConfig(**settings))
    fast = get_peft_model(bases[1], use_fused_layers(LoraConfig(**settings), bases[1]))
    fast.load_state_dict(plain.state_dict())
    return Pair(plain.eval(), fast.eval())


def make_rows(lengths: Sequence[int], seed: int = 0, vocab: int = 300) -> list[Encoded]:
    """Rows of random tokens: a third is prompt, and an unlabelled turn stands between the labelled ones."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for length in lengths:
        ids = torch.randint(3, vocab, (length,), generator=generator).tolist()
        rows.append(Encoded(ids, with_prompt(ids)))
    return rows


def with_prompt(ids: Sequence[int]) -> list[int]:
    """Labels of all tokens but the first third, and but every sixth and seventh after it."""
    return [IGNORED if i < len(ids) // 3 or i % 7 in (5, 6) else token for i, token in enumerate(ids)]


@dataclass(frozen=True)
class Step:
    """What a step over some rows gives.

    Attributes:
        loss: mean negative log-likelihood of a labelled token.
        correct: labels that were the first choice.
        count: labels.
        gradients: of all that trains, by name.
    """

    loss: float
    correct: int
    count: int
    gradients: dict[str, Tensor]


def one_by_one(model: PeftModel, rows: Sequence[Encoded], *, autocast: bool = False) -> Step:
    """The plain model, each row in a forward of its own."""
    return _plain_step(model, [_batch([row]) for row in rows], autocast)


def padded(model: PeftModel, rows: Sequence[Encoded], *, autocast: bool = False) -> Step:
    """The plain model, all rows padded at their ends to one batch."""
    return _plain_step(model, [_batch(rows)], autocast)


def _batch(rows: Sequence[Encoded]) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, mask and labels, each of shape (rows, longest)."""
    longest = max(len(row.input_ids) for row in rows)
    ids, mask, labels = (torch.full((len(rows), longest), fill) for fill in (0, 0, IGNORED))
    for i, row in enumerate(rows):
        length = len(row.input_ids)
        ids[i, :length], labels[i, :length] = torch.tensor(row.input_ids), torch.tensor(row.labels)
        mask[i, :length] = 1
    return ids, mask, labels


def _plain_step(model: PeftModel, batches: Sequence[tuple[Tensor, Tensor, Tensor]], autocast: bool) -> Step:
    model.zero_grad()
    count = sum(int((labels[:, 1:] != IGNORED).sum()) for _, _, labels in batches)
    loss, correct = 0.0, 0
    for ids, mask, labels in ([part.to(model.device) for part in batch] for batch in batches):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].float()
        wanted = labels[:, 1:]
        part = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), ignore_index=IGNORED, reduction="sum") / count
        part.backward()
        loss += part.item()
        correct += int((logits.argmax(-1) == wanted).sum())
    return Step(loss, correct, count, trained_gradients(model))


def packed(model: PeftModel, rows: Sequence[Encoded], *, share: bool = False) -> Step:
    """The engine's model, all rows as one packed row."""
    return packed_step(model, pack(rows, share=share, rope_limit=rope_limit(model.config)))


def packed_step(model: PeftModel, batch: dict[str, Tensor]) -> Step:
    model.zero_grad()
    out = model(**{name: part.to(model.device) for name, part in batch.items()})
    loss = out.nll / out.count
    loss.backward()
    return Step(loss.item(), round(out.correct.item()), round(out.count.item()), trained_gradients(model))


def trained_gradients(model: PeftModel) -> dict[str, Tensor]:
    return {name: p.grad.detach().clone() for name, p in model.named_parameters() if p.grad is not None}


def keep(model: PeftModel, *levels: Level) -> None:
    """Let each layer of the engine's model keep what its level says; every one all if none is given."""
    core: Any = model.get_base_model()
    core.model.activation_levels = (lambda tokens: levels) if levels else None


def assert_same(found: Step, wanted: Step, loss: float = 1e-5, gradients: float = 1e-4) -> None:
    """The loss to `loss` of its size, every gradient to `gradients` of its norm."""
    assert (found.correct, found.count) == (wanted.correct, wanted.count)
    assert found.loss == pytest.approx(wanted.loss, rel=loss)
    assert found.gradients.keys() == wanted.gradients.keys()
    off = {name: distance(grad, wanted.gradients[name]) for name, grad in found.gradients.items()}
    assert {name: value for name, value in off.items() if not value <= gradients} == {}


def distance(found: Tensor, wanted: Tensor) -> float:
    """Norm of the difference, in norms of `wanted`."""
    found, wanted = found.float(), wanted.float()
    return float((found - wanted).norm() / wanted.norm().clamp(min=1e-12))


def assert_equal_to_the_bit(found: Step, wanted: Step) -> None:
    assert found.loss == wanted.loss
    assert found.gradients.keys() == wanted.gradients.keys()
    assert [name for name, grad in found.gradients.items() if not torch.equal(grad, wanted.gradients[name])] == []
