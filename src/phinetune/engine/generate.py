"""Answers to prompts, in batches of like length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from phinetune.checkpoints.load import has_packed_form
from phinetune.engine.decode import decode

BATCH = 16  # prompts that transformers' generate answers together


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
    batch_size: int | None = None,
    sampling: Sampling | None = None,
    on_done: Callable[[int], None] = lambda count: None,
) -> list[Answer]:
    """Answer prompts given as token ids; answers come back in the order of the prompts.

    Greedy answers of a model with a packed form are `phinetune.engine.decode`'s; the rest goes to transformers'
    `generate`, prompts of like length together.

    Args:
        batch_size: prompts answered together; None: as many as memory allows (`BATCH` by transformers).
    """
    sampling = sampling or Sampling()
    stops = stop_set(model)
    if sampling.temperature <= 0 and has_packed_form(model) and not _more_than_greedy(model):
        core: Any = model.get_base_model() if isinstance(model, PeftModel) else model
        made = decode(core, prompts, stops=stops, limit=max_new_tokens, rows=batch_size, on_done=on_done)
        return [_read_answer(tokenizer, ids, stops) for ids in made]
    size = batch_size or BATCH
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers: dict[int, Answer] = {}
    for start in range(0, len(order), size):
        chosen = order[start : start + size]
        rows = _generate(model, tokenizer, [prompts[i] for i in chosen], max_new_tokens, sampling)
        answers.update((i, _read_answer(tokenizer, row, stops)) for i, row in zip(chosen, rows, strict=True))
        on_done(len(chosen))
    return [answers[i] for i in range(len(prompts))]


# What of a generation config leaves the likeliest token the one chosen: it is about sampling, ids, or bookkeeping.
NO_MATTER = {
    *("do_sample", "temperature", "top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "max_length", "max_new_tokens", "use_cache"),
    *("transformers_version", "_from_model_config", "_name_or_path", "cache_implementation", "renormalize_logits"),
    *("return_dict_in_generate", "output_scores", "output_logits", "output_attentions", "output_hidden_states"),
}


def _more_than_greedy(model: Any) -> bool:
    """Whether the checkpoint's generation config bends the choice (a repetition penalty, beams), or bars a cache."""
    config = model.generation_config
    return config.use_cache is False or any(key not in NO_MATTER for key in config.to_diff_dict())


def _generate(
    model: Any, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]], limit: int, sampling: Sampling
) -> list[list[int]]:
    """The new tokens of each prompt, by transformers."""
    pad = tokenizer.pad_token_id
    width = max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    output = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=limit, pad_token_id=pad, **sampling.options()
    )
    return [row[width:].tolist() for row in output]


def stop_set(model: Any) -> set[int]:
    """The ids at which this model's generation stops."""
    eos = model.generation_config.eos_token_id
    return {eos} if isinstance(eos, int) else set(eos or [])


def _read_answer(tokenizer: PreTrainedTokenizerBase, ids: list[int], stops: set[int]) -> Answer:
    end = next((i for i, token in enumerate(ids) if token in stops), None)
    kept = ids if end is None else ids[:end]
    return Answer(str(tokenizer.decode(kept, skip_special_tokens=True)), len(kept), end is not None)
