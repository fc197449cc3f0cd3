"""The chat templates of the Phi-3 family with byte-level tokenizers that have their control tokens.

`data/templates/*.jinja` are written for these tests: they render what the published templates render, byte for byte.
`snapshots.json` holds renderings made with the published ones (their SHA-256 beside them), as public repositories quote
them from the checkpoints' tokenizer_config.json, MIT licence:

- phi-3: microsoft/Phi-3-mini-4k-instruct and -128k-instruct since July 2024
- phi-3-april-2024: microsoft/Phi-3-mini-4k-instruct as first released
- phi-3.5: microsoft/Phi-3.5-mini-instruct; also at shared/phi3-tokenizer/chat_template.jinja
- phi-4: microsoft/phi-4 since January 2025
- phi-4-mini: microsoft/Phi-4-mini-instruct
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

FOLDER = Path(__file__).parent / "templates"
SNAPSHOTS: dict[str, Any] = json.loads((FOLDER / "snapshots.json").read_text(encoding="utf-8"))
NAMES = ["phi-3", "phi-3-april-2024", "phi-3.5", "phi-4", "phi-4-mini"]

_PHI3 = ["<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
# Tokens and whether they swallow white space on their left and right, as the checkpoints declare them.
CONTROL: dict[str, tuple[list[str], bool]] = {
    "phi-3": (_PHI3, False),
    "phi-3-april-2024": (_PHI3, False),
    "phi-3.5": (_PHI3, False),
    "phi-4": (["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|im_sep|>"], True),
    "phi-4-mini": (_PHI3, False),
}
# Declared as added but not special.
TOOL_TOKENS = ["<|tool|>", "<|/tool|>", "<|tool_call|>", "<|/tool_call|>", "<|tool_response|>"]
ENDS = {name: "<|im_end|>" if name == "phi-4" else "<|end|>" for name in NAMES}


def read_template(name: str) -> str:
    return (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")


def byte_level(template: str, tokens: list[str], *, left: bool, tools: bool = False, **names: str) -> Any:
    """A tokenizer of bytes with control tokens that swallow white space to their right, and perhaps to their left."""
    added = ["<s>", *tokens, *(TOOL_TOKENS if tools else [])]
    letters = bytes_to_unicode().values()
    vocabulary = {token: i for i, token in enumerate([*added, *letters])}
    core = Tokenizer(models.BPE(vocabulary, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(token, lstrip=left, rstrip=True, special=True) for token in tokens])
    if tools:
        core.add_tokens([AddedToken(token, rstrip=True, special=False, normalized=False) for token in TOOL_TOKENS])
    return PreTrainedTokenizerFast(tokenizer_object=core, chat_template=template, **names)


def template_tokenizer(name: str) -> Any:
    tokens, left = CONTROL[name]
    special = SNAPSHOTS["special_tokens"][name]
    return byte_level(read_template(name), tokens, left=left, tools=name == "phi-4-mini", **special)
