"""onnxruntime-genai as a client that runs exported folders."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest


class Genai:
    """A folder in onnxruntime-genai."""

    def __init__(self, folder: Path) -> None:
        self._og = pytest.importorskip("onnxruntime_genai")
        self._model = self._og.Model(str(folder))
        self._tokenizer = self._og.Tokenizer(self._model)

    def tokenize(self, text: str) -> list[int]:
        return [int(i) for i in self._tokenizer.encode(text)]

    def render(self, messages: Sequence[dict[str, str]]) -> str:
        """A chat rendered by the template in the folder, with the header of the answer at its end."""
        return str(self._tokenizer.apply_chat_template(json.dumps(list(messages)), add_generation_prompt=True))

    def greedy(self, ids: Sequence[int], count: int) -> list[int]:
        """The next `count` tokens, or fewer if the answer ends; the end token is left out."""
        params = self._og.GeneratorParams(self._model)
        params.set_search_options(do_sample=False, max_length=len(ids) + count)
        generator = self._og.Generator(self._model, params)
        generator.append_tokens(list(ids))
        while not generator.is_done():
            generator.generate_next_token()
        return [int(i) for i in generator.get_sequence(0)[len(ids) :]]
