"""Random models of true shape, and their tokenizer that behaves as Phi-3's does."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from helpers import TINY
from phinetune.checkpoints.random_shapes import byte_tokenizer, parse_shape, random_model
from phinetune.errors import ModelError

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi <there>\n"},
    {"role": "assistant", "content": "Hello, ünï 🙂"},
    {"role": "tool", "content": "dropped"},
]


def test_phi_3_mini_has_its_true_shape() -> None:
    config = parse_shape("random:phi-3-mini")
    shape = (config.num_hidden_layers, config.hidden_size, config.intermediate_size, config.num_attention_heads)
    assert shape == (32, 3072, 8192, 32)
    assert (config.vocab_size, config.sliding_window, config.eos_token_id) == (32064, 2047, 32000)


def test_a_preset_can_be_changed() -> None:
    config = parse_shape("random:phi-4{layers: 2}")
    assert (config.num_hidden_layers, config.hidden_size, config.num_key_value_heads) == (2, 5120, 10)
    assert parse_shape("random:{layers: 4}").num_hidden_layers == 4
    assert parse_shape("random:{heads: 8, hidden: 64}").num_key_value_heads == 8


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("random:phi-9", "known: phi-3-mini"),
        ("random:{layrs: 4}", "did you mean `layers`?"),
        ("random:{layers: [}", "write it as"),
        ("random:{layers: 4, num_hidden_layers: 2}", "`layers` and `num_hidden_layers` are the same; keep one"),
        ("random:{layers: 4, layers: 2}", "model.path: random:{layers: 4, layers: 2}: `layers` is given twice; keep"),
        ("random:{layers: " + "[" * 3000, "write it as"),
        ("random:{hidden: 30, heads: 4}", "multiple of num_attention_heads"),
        ("random:{vocab: 100}", "vocab_size must be"),
        ("random:{layers: many}", "num_hidden_layers"),
    ],
)
def test_a_bad_shape_is_refused(path: str, words: str) -> None:
    with pytest.raises(ModelError) as caught:
        parse_shape(path)
    assert words in str(caught.value)


def test_weights_come_from_the_seed_and_leave_the_global_generator_alone() -> None:
    config = parse_shape(TINY)
    before = torch.get_rng_state()
    first, again, other = (random_model(config, seed, torch.float32, "sdpa") for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    weights = [m.model.layers[0].self_attn.qkv_proj.weight for m in (first, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize("reply", [True, False], ids=["with header", "without header"])
@pytest.mark.parametrize("messages", [CHAT, CHAT[1:], CHAT[:2]], ids=["whole chat", "no system message", "no answer"])
def test_the_template_renders_what_phi_3_5_renders(phi3_tokenizer: Any, messages: list[Any], reply: bool) -> None:
    own, theirs = (
        tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=reply)
        for tokenizer in (byte_tokenizer(), phi3_tokenizer)
    )
    assert own == theirs


def test_special_tokens_have_phi_3_ids_and_swallow_white_space_to_their_right(phi3_tokenizer: Any) -> None:
    own = byte_tokenizer()
    text = "<|user|>\n  a <|end|>\n<|assistant|> b<|endoftext|>"
    special = [[i for i in t(text, add_special_tokens=False)["input_ids"] if i >= 32000] for t in (own, phi3_tokenizer)]
    assert special[0] == special[1]
    assert own.decode(own(text)["input_ids"]) == "<|user|>a <|end|><|assistant|>b<|endoftext|>"


def test_any_text_survives_the_bytes() -> None:
    own = byte_tokenizer(300)
    text = "tabs\t, lines\n\r\n, ünïcode 漢字 🙂 and  spaces "
    assert own.decode(own(text)["input_ids"]) == text
