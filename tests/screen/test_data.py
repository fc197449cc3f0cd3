"""The preview shows every token, and which ones are trained on."""

from __future__ import annotations

from phinetune.chats.encoder import make_encoder
from phinetune.checkpoints.random_shapes import byte_tokenizer
from phinetune.screen.data import SHOWN, preview


def test_trained_tokens_are_told_apart() -> None:
    encoder = make_encoder(byte_tokenizer(300))
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    text = preview(encoder.tokenizer, encoder.encode([chat])[0])
    assert text.plain == "<|user|>Hi<|end|><|assistant|>Hello<|end|><|endoftext|>"
    assert [text.plain[s.start : s.end] for s in text.spans if "green" in str(s.style)] == ["Hello<|end|><|endoftext|>"]


def test_without_colours_trained_tokens_are_marked() -> None:
    encoder = make_encoder(byte_tokenizer(300))
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    text = preview(encoder.tokenizer, encoder.encode([chat])[0], marks=True)
    assert text.plain == "<|user|>Hi<|end|><|assistant|>⟦Hello<|end|><|endoftext|>⟧"


def test_a_long_row_is_shortened_in_the_middle() -> None:
    encoder = make_encoder(byte_tokenizer(300))
    chat = [{"role": "user", "content": "x" * 5000}, {"role": "assistant", "content": "end"}]
    text = preview(encoder.tokenizer, encoder.encode([chat])[0])
    assert len(text) < SHOWN + 20
    assert text.plain.endswith("end<|end|><|endoftext|>")


def test_control_characters_cannot_act_on_the_terminal() -> None:
    encoder = make_encoder(byte_tokenizer(300))
    chat = [{"role": "user", "content": "a\x1b[2J\nb\x85\u3000"}, {"role": "assistant", "content": "c\x07"}]
    text = preview(encoder.tokenizer, encoder.encode([chat])[0]).plain
    assert text == "<|user|>a␛[2J\nb�\u3000<|end|><|assistant|>c␇<|end|><|endoftext|>"
