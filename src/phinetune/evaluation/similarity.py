"""How near an answer's meaning is to its reference's, by a sentence encoder (Reimers & Gurevych 2019).

The encoder is an ordinary transformers model. Its hidden states become one vector as sentence-transformers' own files
say beside the weights: the mean over the tokens, or the state of the first one.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel, AutoTokenizer
from transformers.utils import cached_file

from phinetune.errors import ModelError, told_as

MOST_TOKENS = 512  # of a text, where the encoder does not say how many it takes


class Similarity:
    """The cosine of the vectors of answer and reference, in percent; None if the reference is empty.

    Args:
        name: the metric's, for errors.
        place: the encoder's folder, or its id on the hub. Its weights must be safetensors, and no code of it runs.

    Raises:
        ModelError: it can't be loaded, or it makes its vectors in a way that is not known here.
    """

    def __init__(self, name: str, place: str) -> None:
        where = f"evaluation.metrics: `{name}`: {place}"
        path = str(Path(place).expanduser())
        with told_as(ModelError, where):
            self.tokenizer: Any = AutoTokenizer.from_pretrained(path)
            self.model: Any = AutoModel.from_pretrained(path, use_safetensors=True, dtype=torch.float32).eval()
            pooling = _settings(path, "1_Pooling/config.json")
            modules = _settings(path, "modules.json")
        self.by_first = bool(pooling.get("pooling_mode_cls_token"))
        modes = [key for key, on in pooling.items() if key.startswith("pooling_mode_") and on]
        strange = [key for key in modes if key not in ("pooling_mode_cls_token", "pooling_mode_mean_tokens")]
        strange += [str(one.get("type")) for one in modules or () if str(one.get("type", "")).endswith(".Dense")]
        if strange or len(modes) > 1:
            raise ModelError(
                f"{where}: its vectors are made in a way that is not known here: {', '.join(strange or modes)}"
            )
        limit = getattr(self.model.config, "max_position_embeddings", None) or MOST_TOKENS
        self.limit = min(limit, self.tokenizer.model_max_length, MOST_TOKENS)
        self.vector = functools.lru_cache(maxsize=4096)(self._vector)

    def __call__(self, answer: str, reference: str, messages: Any) -> float | None:
        if not reference.strip():
            return None
        return 100.0 * float(torch.nn.functional.cosine_similarity(self.vector(answer), self.vector(reference), dim=0))

    @torch.no_grad()
    def _vector(self, text: str) -> torch.Tensor:
        """The vector of a text, shape (width)."""
        ids = self.tokenizer(text, truncation=True, max_length=self.limit, return_tensors="pt")
        if not ids["input_ids"].numel():
            return torch.zeros(self.model.config.hidden_size)
        states: torch.Tensor = self.model(**ids).last_hidden_state[0]
        return states[0] if self.by_first else states.mean(dim=0)


def _settings(path: str, name: str) -> Any:
    """A JSON file beside the weights; empty if there is none."""
    file = cached_file(
        path, name, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False
    )
    return json.loads(Path(file).read_text(encoding="utf-8")) if file else {}
