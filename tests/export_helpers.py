"""What the tests of exports share."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase


class TunedStarter(NamedTuple):
    """A run on the demo's chats, opened in float32, and prompts that it was not trained on."""

    model: Any
    tokenizer: PreTrainedTokenizerBase
    folder: Path
    chats: list[list[dict[str, str]]]
