"""An exported ONNX folder in onnxruntime-genai."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from phinetune.errors import ModelError


class Genai:
    """onnxruntime-genai on one folder.

    Raises:
        ModelError: onnxruntime-genai is not installed.
    """

    def __init__(self, folder: Path) -> None:
        try:
            import onnxruntime_genai
        except ImportError as error:
            raise ModelError("running an ONNX folder needs onnxruntime-genai: pip install 'phinetune[onnx]'") from error
        self._og = onnxruntime_genai
        self._model = onnxruntime_genai.Model(str(folder))

    def answer(self, prompt: Sequence[int], limit: int) -> list[int]:
        """The greedy answer to a prompt, without the token that ended it."""
        params = self._og.GeneratorParams(self._model)
        params.set_search_options(do_sample=False, max_length=len(prompt) + limit)
        generator = self._og.Generator(self._model, params)
        generator.append_tokens(list(prompt))
        while not generator.is_done():
            generator.generate_next_token()
        return [int(token) for token in generator.get_sequence(0)[len(prompt) :]]

    def close(self) -> None:
        """Free the model."""
        del self._model
