"""A GGUF file in llama.cpp, by its server on loopback in this process (xllamacpp)."""

from __future__ import annotations

import json
import os
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from phinetune.engine.examples import IGNORED, Encoded
from phinetune.errors import ModelError, RunError
from phinetune.exporting.gguf.quantiser import INSTALL

LIKELIEST = 64  # tokens whose probabilities are asked for at first; a label is seldom beyond them
FORCED = 1000.0  # a bias that makes any token certain
ROOM = 16  # tokens of the context beyond the longest row


class LlamaCpp:
    """llama.cpp with its own settings, one conversation at a time.

    Raises:
        ModelError: xllamacpp is not installed, or llama.cpp does not load the file.
    """

    def __init__(self, file: Path, longest: int) -> None:
        """Args: longest: tokens of the longest row with its answer."""
        try:
            import xllamacpp
        except ImportError as error:
            raise ModelError(f"running a GGUF file needs llama.cpp: {INSTALL}") from error
        params = xllamacpp.CommonParams()
        params.model.path, params.n_parallel, params.port = str(file), 1, 0
        params.n_ctx = longest + ROOM
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = os.cpu_count() or 1
        params.n_gpu_layers, params.verbosity = 0, 0
        try:
            self._server = xllamacpp.Server(params)
        except RuntimeError as error:
            raise ModelError(f"{file}: llama.cpp does not load it: {error}") from error
        self._plain = self._plain_token()

    def close(self) -> None:
        """End the server."""
        del self._server

    def answer(self, prompt: Sequence[int], limit: int) -> list[int]:
        """The greedy answer to a prompt, without the token that ended it."""
        body = {"prompt": list(prompt), "n_predict": limit, "temperature": 0, "return_tokens": True}
        found = self._post("/completion", {**body, "cache_prompt": False})
        tokens = [int(token) for token in found["tokens"]]
        return tokens[:-1] if found.get("stop_type") == "eos" and tokens else tokens

    def nll(self, row: Encoded) -> float:
        """The summed negative log-likelihood of a row's labels, in nats: one request a label."""
        ids = list(row.input_ids)
        return -sum(
            self._log_probability(ids[:place], label)
            for place, label in enumerate(row.labels)
            if label != IGNORED and place
        )

    def _log_probability(self, ids: list[int], label: int) -> float:
        """Of a token after others.

        llama.cpp tells probabilities only beside a token that is text, so one is forced. Its bias changes what is
        taken, not the probabilities.
        """
        count = LIKELIEST
        while True:
            found = self._likeliest(ids, count)
            if label in found:
                return found[label]
            if len(found) < count:
                raise RunError(f"llama.cpp has no probability of token {label}")
            count *= 64

    def _likeliest(self, ids: list[int], count: int) -> dict[int, float]:
        body = {"prompt": ids, "n_predict": 1, "temperature": 0, "n_probs": count, "cache_prompt": True}
        answer = self._post("/completion", {**body, "logit_bias": [[self._plain, FORCED]]})
        likeliest = answer["completion_probabilities"][0]["top_logprobs"]
        return {int(token["id"]): float(token["logprob"]) for token in likeliest}

    def _plain_token(self) -> int:
        """A token that is text by itself."""
        tokens = self._post("/tokenize", {"content": "a", "add_special": False})["tokens"]
        return int(tokens[-1])

    def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self._server.listening_address + path, json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request) as answer:
            result: dict[str, Any] = json.load(answer)
        return result
