"""onnxruntime-genai as a client that runs exported folders."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from phinetune.exporting.measuring import genai as measuring


class Genai(measuring.Genai):
    """A folder in onnxruntime-genai."""

    def __init__(self, folder: Path) -> None:
        pytest.importorskip("onnxruntime_genai")
        super().__init__(folder)
        self._tokenizer = self._og.Tokenizer(self._model)

    def tokenize(self, text: str) -> list[int]:
        return [int(i) for i in self._tokenizer.encode(text)]

    def render(self, messages: Sequence[dict[str, str]]) -> str:
        """A chat rendered by the template in the folder, with the header of the answer at its end."""
        return str(self._tokenizer.apply_chat_template(json.dumps(list(messages)), add_generation_prompt=True))
