"""Tokens and labels that nobody reads make lengths even. They change no number, and lengths come again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from engine.engine_helpers import SHAPES, SPLIT, assert_same, make_pair, make_rows, one_by_one, packed, phi3_mini
from phinetune.engine import even_rows
from phinetune.engine.even_rows import LEAST, MOST, added, evened, missing
from phinetune.engine.kernels.matmul import product_dtype
from phinetune.engine.packing import pack

LENGTHS = [45, 9, 70, 33]


@pytest.fixture
def compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if products of float32 were compiled for their number of rows."""
    monkeypatch.setattr(even_rows, "_compiles", lambda like: True)


def like(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.ones(1, dtype=dtype)


@pytest.mark.usefixtures("compiles")
@pytest.mark.parametrize("shape", {**SHAPES, **SPLIT}.items(), ids=lambda shape: shape[0])
def test_a_step_is_that_of_the_plain_model(shape: tuple[str, Callable[[], Any]]) -> None:
    pair, rows = make_pair(shape[1]()), make_rows(LENGTHS)
    assert_same(packed(pair.fast, rows), one_by_one(pair.plain, rows))
    begun = [*rows, *(type(row)(rows[2].input_ids[:40] + row.input_ids, [-100] * 40 + row.labels) for row in rows)]
    assert_same(packed(pair.fast, begun, share=True), one_by_one(pair.plain, begun))


def test_log_probabilities_of_conversations_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = make_pair(phi3_mini()).fast, make_rows(LENGTHS)
    batch = pack(rows, owned=True)
    found = []
    for compiles in (False, True):
        monkeypatch.setattr(even_rows, "_compiles", lambda like, compiles=compiles: compiles)
        model.zero_grad()
        out = model(**batch, spread=True)
        (out.log_probs * torch.arange(4)).sum().backward()
        grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        found.append([out.log_probs, out.correct, out.count, out.entropy, out.logits, *grads])
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("compiles")
def test_what_is_added_stands_behind_all_else_and_counts_for_nothing() -> None:
    batch = pack(make_rows(LENGTHS))
    made = evened(batch, phi3_mini(), like())
    tokens, labels = sum(LENGTHS), len(batch["labels"])
    assert made["input_ids"].shape == made["position_ids"].shape == (1, 192)
    assert made["segments"].tolist() == [*batch["segments"].tolist(), [tokens, 192, -1]]
    assert len(made["predicts"]) == len(made["labels"]) == len(made["weights"]) == 128
    assert not made["weights"][labels:].any()
    assert torch.equal(made["input_ids"][:, :tokens], batch["input_ids"])
    assert torch.equal(made["position_ids"][:, :tokens], batch["position_ids"])
    for name in ("predicts", "labels", "weights"):
        assert torch.equal(made[name][:labels], batch[name])
    assert made["row_tokens"] == tokens


def test_lengths_come_again() -> None:
    assert missing(0, 1) == 0
    for count in range(1, 5000):
        whole = count + missing(count, 1)
        assert whole % LEAST == 0
        assert whole - count < max(LEAST, count / 7)
    assert len({count + missing(count, 1) for count in range(512, 4096)}) == 24 + 1


def test_a_large_model_gets_few_tokens_or_none() -> None:
    assert missing(100, MOST // 28) == 28
    assert missing(100, MOST // 28 + 1) == 0
    assert missing(128, MOST) == 0


def test_nothing_is_added_where_nothing_is_compiled() -> None:
    half = like(torch.bfloat16)
    assert added(190, 80, phi3_mini(), like()) == (0, 0)
    assert (added(190, 80, phi3_mini(), half) == (0, 0)) == (product_dtype(half) == torch.float32)
    assert added(190, 80, phi3_mini(), half.to("meta")) == (0, 0)
    batch = pack(make_rows(LENGTHS))
    assert evened(batch, phi3_mini(), like()) == batch
