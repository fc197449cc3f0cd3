"""`generate`, `chat` and `load`: a run, an adapter folder or a model, opened to answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from phinetune.checkpoints.opened import open_model, opened_config
from phinetune.config.answer_weights import AUTO, check_kind
from phinetune.engine.generate import Answer, Sampling
from phinetune.errors import ConfigError
from phinetune.talk.conversation import Conversation


def generate(
    path: str | Path,
    prompt: str,
    *,
    system: str | None = None,
    base: bool = False,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int | None = None,
    weights: str = AUTO,
    **model_options: Any,
) -> Answer:
    """Answer one message.

    Args:
        path: a run, an adapter folder or a model (hub id or folder).
        system: a system message.
        base: let the base model answer.
        max_new_tokens: tokens the answer may have.
        temperature: 0 is greedy; higher is more varied.
        top_p, top_k: sample from the likeliest tokens; see `phinetune.engine.generate.Sampling`.
        seed: of the sampling.
        weights: how the base lies in memory: `q8_0` rounds its linear layers to eight bits, as llama.cpp does, so that
            each step of an answer reads half as much; `auto` changes no number.
        model_options: keys of the section `model` (`device`, `dtype`, …).

    Raises:
        PhinetuneError: the model can't be had, or an option is out of its range.
    """
    if not prompt.strip():
        raise ConfigError("there is no message: the prompt is empty")
    conversation = chat(
        path,
        system=system,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=seed,
        weights=weights,
        **model_options,
    )
    conversation.with_base = base
    return conversation.answer(prompt.strip())


def chat(
    path: str | Path,
    *,
    system: str | None = None,
    max_new_tokens: int = 512,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int | None = None,
    weights: str = AUTO,
    **model_options: Any,
) -> Conversation:
    """A conversation with a run, an adapter folder or a model: `answer` and `stream` remember the turns.

    Args:
        path, system, max_new_tokens, temperature, top_p, top_k, seed, weights, model_options: see `generate`.

    Raises:
        PhinetuneError: see `generate`.
    """
    sampling = Sampling(temperature, top_p, top_k)
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens: {max_new_tokens} is not 1 or more")
    check_kind(weights)
    opened = open_model(path, opened_config(path, **model_options), weights=weights)
    if seed is not None:
        torch.manual_seed(seed)
    return Conversation(opened, sampling, max_new_tokens, system)


def load(path: str | Path, **model_options: Any) -> tuple[Any, Any]:
    """(model, tokenizer) of a run, an adapter folder or a model: transformers' and PEFT's own objects.

    Args:
        model_options: keys of the section `model` (`device`, `dtype`, …).

    Raises:
        ModelError: see `phinetune.checkpoints.opened.open_model`.
    """
    opened = open_model(path, **model_options)
    return opened.model, opened.loaded.tokenizer
