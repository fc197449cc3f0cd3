"""Shared by the tests of exports: texts and chats on which tokenizers differ, and a tuned starter."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

# Texts on which tokenizers differ: white space before digits and words, contractions, scripts, emoji, control tokens.
TEXTS = [
    "Hello  world",
    "\n \n\n \t \t\t\n  \n   x",
    "a  3\t\t44   555    6666",
    "   7\n   seven",
    "I've 'told he's there, 'RE you sure? We'Ve a'lL DON'T",
    "3.3 3..3 3...3 ------======= ''''''```````\"\"\"\"......!!!!!!??????",
    "МОСКВА Ελλάδα ñandú Ünïcödé ǅungla",
    "កាន់តែពិសេសអាច 我想在apple工作1314151天～ 日本語テスト",
    "🚀 (normal) 😶‍🌫️ (multiple emojis concatenated) ✅",
    "e\u0301 \u200b\u00a0x",
]
CHATS: list[list[dict[str, str]]] = [
    [{"role": "user", "content": text}] for text in [*TEXTS, " leading", "trailing \n\n", "\n\nlines\n"]
] + [
    [
        {"role": "system", "content": "Be good.\n"},
        {"role": "user", "content": " 1  2"},
        {"role": "assistant", "content": "\n 3"},
        {"role": "user", "content": "  4?"},
    ]
]


class TunedStarter(NamedTuple):
    """A run on the demo's chats, opened in float32, and prompts that it was not trained on."""

    model: Any
    tokenizer: PreTrainedTokenizerBase
    folder: Path
    chats: list[list[dict[str, str]]]
