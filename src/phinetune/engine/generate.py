"""Answers prompts, several at a time."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from phinetune.engine.choice import has_packed_form
from phinetune.engine.greedy_decode import decode
from phinetune.errors import ConfigError, at_most

logger = logging.getLogger(__name__)

BATCH = 16  # prompts that transformers' generate answers together


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: what logits are divided by before a token is drawn; 0 always takes the likeliest token (greedy).
        top_p: draw from the likeliest tokens whose probabilities add up to this.
        top_k: draw from this many likeliest tokens; 0 is all.

    Raises:
        ConfigError: a number is out of its range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0

    def __post_init__(self) -> None:
        problems = []
        if not 0 <= self.temperature < math.inf:
            problems.append(f"temperature: {self.temperature} is not 0 or more")
        if not 0 <= self.top_p <= 1:
            problems.append(f"top_p: {self.top_p} does not lie between 0 and 1")
        if self.top_k < 0:
            problems.append(f"top_k: {self.top_k} is not 0 or more")
        if problems:
            raise ConfigError(problems)

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
    """One generated answer.

    Attributes:
        tokens: how many tokens it has, without the one that ended it.
        stopped: whether it ended by itself, not because it reached the limit.
        ids: these tokens.
    """

    text: str
    tokens: int
    stopped: bool
    ids: tuple[int, ...]


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
    """Answer prompts.

    If the model has a packed form, `phinetune.engine.greedy_decode` gives greedy answers. transformers' `generate`
    gives all others; it gets prompts of similar length together.

    Args:
        model: in evaluation mode.
        prompts: token ids, at least one for each prompt.
        max_new_tokens: how many tokens an answer may have.
        batch_size: how many prompts are answered together. None: as many as memory allows (transformers: `BATCH`).
        sampling: None is greedy.
        on_done: called with the number of answers that have just ended.

    Returns:
        the answers, in the order of the prompts.

    Raises:
        ConfigError: a prompt leaves no room for an answer in the model's positions.
    """
    sampling = sampling or Sampling()
    answers: dict[int, Answer] = {}
    for limit, chosen in _by_limit(model, prompts, max_new_tokens).items():
        made = _answer_alike(model, tokenizer, [prompts[i] for i in chosen], limit, batch_size, sampling, on_done)
        answers.update(zip(chosen, made, strict=True))
    return [answers[i] for i in range(len(prompts))]


def answer_limits(model: Any, prompts: Sequence[list[int]], max_new_tokens: int) -> list[int]:
    """How many tokens the answer to each prompt may have, so that prompt and answer fit the model's positions.

    A line in the log says so where that is fewer than `max_new_tokens`.

    Raises:
        ConfigError: a prompt leaves no room for an answer.
    """
    positions = int(model.config.max_position_embeddings)
    check_prompts(prompts, positions)
    limits = [min(max_new_tokens, positions - len(prompt)) for prompt in prompts]
    short = [limit for limit in limits if limit < max_new_tokens]
    if short:
        logger.warning(
            "%d of %d prompts leave room for %d tokens or more in the model's %d positions, not for %d: their answers "
            "end there",
            *(len(short), len(prompts), min(short), positions, max_new_tokens),
        )
    return limits


def check_prompts(prompts: Sequence[list[int]], positions: int) -> None:
    """Make sure that a model can answer prompts.

    Args:
        positions: how many tokens the model has positions for (`max_position_embeddings`).

    Raises:
        ConfigError: a prompt leaves no room for an answer.
    """
    problems = [
        f"the prompt has {len(prompt)} tokens, and the model has positions for {positions}, answer included; shorten it"
        for prompt in prompts
        if len(prompt) >= positions
    ]
    if problems:
        raise ConfigError(at_most(problems, 8))


def _by_limit(model: Any, prompts: Sequence[list[int]], max_new_tokens: int) -> dict[int, list[int]]:
    """The places of the prompts, by how many tokens their answers may have."""
    groups: dict[int, list[int]] = {}
    for place, limit in enumerate(answer_limits(model, prompts, max_new_tokens)):
        groups.setdefault(limit, []).append(place)
    return groups


def _answer_alike(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    batch_size: int | None,
    sampling: Sampling,
    on_done: Callable[[int], None],
) -> list[Answer]:
    """Answer prompts that have the same limit."""
    stops = stop_set(model)
    if sampling.temperature <= 0 and has_packed_form(model) and not _needs_transformers(model):
        core: Any = model.get_base_model() if isinstance(model, PeftModel) else model
        decoded = decode(core, prompts, stops=stops, limit=max_new_tokens, rows=batch_size, on_done=on_done)
        return [_read_answer(tokenizer, ids, stops) for ids in decoded]
    size = batch_size or BATCH
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers: dict[int, Answer] = {}
    for start in range(0, len(order), size):
        chosen = order[start : start + size]
        rows = _generate(model, tokenizer, [prompts[i] for i in chosen], max_new_tokens, sampling)
        answers.update((i, _read_answer(tokenizer, row, stops)) for i, row in zip(chosen, rows, strict=True))
        on_done(len(chosen))
    return [answers[i] for i in range(len(prompts))]


# Keys of a generation config that do not change greedy answers: they are about sampling, ids or bookkeeping.
HARMLESS = {
    *("do_sample", "temperature", "top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "max_length", "max_new_tokens", "use_cache"),
    *("transformers_version", "_from_model_config", "_name_or_path", "cache_implementation", "renormalize_logits"),
    *("return_dict_in_generate", "output_scores", "output_logits", "output_attentions", "output_hidden_states"),
}


def _needs_transformers(model: Any) -> bool:
    """Whether the checkpoint's generation config forbids a cache or changes which token is taken (a repetition penalty,
    beams, …).
    """
    config = model.generation_config
    return config.use_cache is False or any(key not in HARMLESS for key in config.to_diff_dict())


def _generate(
    model: Any, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]], limit: int, sampling: Sampling
) -> list[list[int]]:
    """The new tokens of each prompt, from transformers' `generate`."""
    pad = tokenizer.pad_token_id
    width = max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    output = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=limit, pad_token_id=pad, **sampling.options()
    )
    return [row[width:].tolist() for row in output]


def stop_set(model: Any) -> set[int]:
    """The token ids at which this model stops an answer."""
    eos = model.generation_config.eos_token_id
    return {eos} if isinstance(eos, int) else set(eos or [])


def _read_answer(tokenizer: PreTrainedTokenizerBase, ids: list[int], stops: set[int]) -> Answer:
    end = next((i for i, token in enumerate(ids) if token in stops), None)
    answer = ids if end is None else ids[:end]
    return Answer(str(tokenizer.decode(answer, skip_special_tokens=True)), len(answer), end is not None, tuple(answer))
