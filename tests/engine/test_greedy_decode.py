"""Greedy answers of the engine: token by token those of transformers' `generate`, one prompt at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from peft import PeftModel

from engine.engine_helpers import LIMIT, SHAPES, Pair, make_pair, windowed
from helpers import DEVICE, TINY
from phinetune.checkpoints.load import load_base
from phinetune.config.model import ModelSection
from phinetune.engine import greedy_decode as decoding
from phinetune.engine.generate import answer_prompts
from phinetune.engine.greedy_decode import decode

STOPS = {5, 77, 131}
LENGTHS = (3, 40, 7, 29, 3, 18, 1, 31, 60)


def some_prompts(lengths: Sequence[int] = LENGTHS, shared: int = 0) -> list[list[int]]:
    """Random tokens; the first `shared` are the same in all."""
    generator = torch.Generator().manual_seed(3)
    start = torch.randint(3, 300, (shared,), generator=generator).tolist()
    return [[*start, *torch.randint(3, 300, (n,), generator=generator).tolist()] for n in lengths]


def by_transformers(model: PeftModel, prompts: Sequence[list[int]], limit: int, stops: set[int]) -> list[list[int]]:
    """New tokens of each prompt, one call a prompt."""
    answers = []
    for prompt in prompts:
        ids = torch.tensor([prompt], device=model.device)
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=limit,
            do_sample=False,
            eos_token_id=sorted(stops),
            pad_token_id=0,
        )
        answers.append(out[0, len(prompt) :].tolist())
    return answers


def by_engine(pair: Pair, prompts: Sequence[list[int]], limit: int, stops: set[int], **options: Any) -> list[list[int]]:
    core: Any = pair.fast.get_base_model()
    return decode(core, prompts, stops=stops, limit=limit, **options)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("shared", [0, 20])
def test_token_by_token_as_transformers(shape: str, shared: int) -> None:
    """Prompts below, at and past longrope's first limit, answers that cross it, and the window's length."""
    pair = make_pair(SHAPES[shape]()).to(DEVICE)
    prompts = some_prompts(shared=shared)
    endless = by_transformers(pair.plain, prompts, 24, set())
    assert by_engine(pair, prompts, 24, set()) == endless
    stops = {endless[0][3], endless[3][9], endless[5][15]}
    wanted = by_transformers(pair.plain, prompts, 24, stops)
    assert by_engine(pair, prompts, 24, stops) == wanted
    assert len({len(answer) for answer in wanted}) > 2  # some stop early, at more than one place


@pytest.mark.parametrize("rows", [1, 2, 4])
def test_how_many_are_answered_together_does_not_matter(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = make_pair(SHAPES["phi-4-mini"]())
    prompts = some_prompts()
    wanted = by_engine(pair, prompts, 16, STOPS)
    assert by_engine(pair, prompts, 16, STOPS, rows=rows) == wanted
    monkeypatch.setattr(decoding, "PROMPT_TOKENS", 50)  # prompts are read in several portions
    assert by_engine(pair, prompts, 16, STOPS) == wanted


def test_an_answer_that_crosses_longropes_limit_is_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The prompt just fits the short factors; the answer's third token is past them."""
    pair = make_pair(SHAPES["phi-3.5-mini"]())
    prompts = some_prompts((LIMIT - 2,))
    wanted = by_transformers(pair.plain, prompts, 8, set())
    assert by_engine(pair, prompts, 8, set()) == wanted
    monkeypatch.setattr(decoding, "rope_limit", lambda config: None)
    assert by_engine(pair, prompts, 8, set()) != wanted  # it would not be without


def test_the_adapter_counts_and_can_be_switched_off() -> None:
    pair = make_pair(windowed())
    prompts = some_prompts((9, 4))
    with_adapter = by_engine(pair, prompts, 12, set())
    with pair.fast.disable_adapter(), pair.plain.disable_adapter():
        without = by_engine(pair, prompts, 12, set())
        assert without == by_transformers(pair.plain, prompts, 12, set())
    assert with_adapter == by_transformers(pair.plain, prompts, 12, set()) != without


def test_every_answer_is_counted_once() -> None:
    pair = make_pair(SHAPES["phi-3.5-mini"]())
    counts: list[int] = []
    answers = by_engine(pair, some_prompts(), 16, STOPS, on_done=counts.append)
    assert sum(counts) == len(LENGTHS)
    assert all(len(answer) == 16 or answer[-1] in STOPS for answer in answers)


def test_nothing_asked_is_nothing_answered() -> None:
    assert by_engine(make_pair(windowed()), [], 4, STOPS) == []


def test_left_padded_batches_of_transformers_agree() -> None:
    """Without longrope, whose factors follow the longest of a padded batch there."""
    pair = make_pair(windowed())
    prompts = some_prompts((3, 17, 9))
    ids = torch.tensor([[0] * (17 - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (17 - len(p)) + [1] * len(p) for p in prompts])
    out = pair.plain.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=30, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert by_engine(pair, prompts, 30, set()) == out[:, 17:].tolist()


def test_a_checkpoints_repetition_penalty_is_heeded() -> None:
    """What bends the likeliest token goes to transformers' own `generate`."""
    loaded = load_base(ModelSection(path=TINY))
    prompt = some_prompts((6,))
    likeliest = answer_prompts(loaded.model, loaded.tokenizer, prompt, max_new_tokens=24)
    loaded.model.generation_config.repetition_penalty = 5.0
    penalised = answer_prompts(loaded.model, loaded.tokenizer, prompt, max_new_tokens=24)
    assert penalised != likeliest
    loaded.model.generation_config.repetition_penalty = 1.0
    assert answer_prompts(loaded.model, loaded.tokenizer, prompt, max_new_tokens=24) == likeliest
