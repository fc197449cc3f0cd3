"""Answers to prompts, in batches of like length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; temperature 0 is greedy."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0

    def options(self) -> dict[str, Any]:
        """The arguments of transformers' `generate`."""
        if self.temperature <= 0:
            return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        return {
            "do_sample": True,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k or None,
        }


@dataclass(frozen=True)
class Answer:
    """One generated answer. `stopped` says whether it ended by itself, not at the limit."""

    text: str
    tokens: int
    stopped: bool


@torch.no_grad()
def answer_prompts(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    *,
    max_new_tokens: int,
    batch_size: int,
    sampling: Sampling | None = None,
    on_done: Callable[[int], None] = lambda count: None,
) -> list[Answer]:
    """Answer prompts given as token ids; answers come back in the order of the prompts.

    Prompts of like length are answered together, so little is padded.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers: dict[int, Answer] = {}
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        made = _answer_batch(model, tokenizer, [prompts[i] for i in chosen], max_new_tokens, sampling or Sampling())
        answers.update(zip(chosen, made, strict=True))
        on_done(len(chosen))
    return [answers[i] for i in range(len(prompts))]


def _answer_batch(
    model: Any, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]], limit: int, sampling: Sampling
) -> list[Answer]:
    pad = tokenizer.pad_token_id
    width = max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    output = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=limit, pad_token_id=pad, **sampling.options()
    )
    stops = stop_set(model)
    return [_read_answer(tokenizer, row[width:].tolist(), stops) for row in output]


def stop_set(model: Any) -> set[int]:
    """The ids at which this model's generation stops."""
    eos = model.generation_config.eos_token_id
    return {eos} if isinstance(eos, int) else set(eos or [])


def _read_answer(tokenizer: PreTrainedTokenizerBase, ids: list[int], stops: set[int]) -> Answer:
    end = next((i for i, token in enumerate(ids) if token in stops), None)
    kept = ids if end is None else ids[:end]
    return Answer(str(tokenizer.decode(kept, skip_special_tokens=True)), len(kept), end is not None)
