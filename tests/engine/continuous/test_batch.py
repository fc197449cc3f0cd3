"""Conversations that join and leave at odd times, each with its own adapter: the tokens of `generate` for each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from peft import LoraConfig

from engine.engine_helpers import LORA, SHAPES, SPLIT, make_pair
from engine.test_greedy_decode import by_transformers, some_prompts
from phinetune.engine.continuous import batch as batching
from phinetune.engine.continuous import shelves
from phinetune.engine.continuous.batch import Batch, Row
from phinetune.engine.continuous.low_rank import read_updates
from phinetune.engine.continuous.requests import AnswerStream, Request

NAMES = (None, "one", "two")
# Past longrope's limit Llama's `generate` keeps the keys that it has; the engine computes them anew, as Phi-3's does.
ALIKE = [*SHAPES, *(shape for shape in SPLIT if shape != "phi-3.5 as llama")]


class Setting:
    """A base with two adapters, in the plain form and in the engine's."""

    def __init__(self, shape: str) -> None:
        pair = make_pair({**SHAPES, **SPLIT}[shape]())
        pair.plain.add_adapter("two", LoraConfig(**{**LORA, "r": 3, "use_rslora": True}))
        pair.plain.requires_grad_(False)
        self.plain, self.adapters = pair.plain, {"one": read_updates(pair.plain)}
        self.plain.set_adapter("two")
        self.adapters["two"] = read_updates(pair.plain)
        self.core: Any = pair.fast.unload().eval()

    def batch(self, rows: int = 4, most_bytes: int = 1 << 30) -> Batch:
        return Batch(self.core, self.adapters, rows, most_bytes)

    def alone(self, prompt: list[int], name: str | None, limit: int, stops: set[int]) -> list[int]:
        if name is None:
            with self.plain.disable_adapter():
                return by_transformers(self.plain, [prompt], limit, stops)[0]
        self.plain.set_adapter({"one": "default"}.get(name, name))
        return by_transformers(self.plain, [prompt], limit, stops)[0]


@pytest.fixture(autouse=True)
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts are read in several pieces, and conversations outgrow their shelves."""
    monkeypatch.setattr(batching, "PIECE", 11)
    monkeypatch.setattr(shelves, "SMALLEST", 8)


def answered(batch: Batch, requests: Sequence[Request], every: int = 3) -> list[Row]:
    """The conversations after their answers; one joins each few steps."""
    rows, steps = [], 0
    waiting = list(requests)
    while waiting or any(row.stream.end is None for row in rows):
        if waiting and steps % every == 0:
            rows.append(Row(waiting.pop(0), AnswerStream()))
            batch.add(rows[-1])
        assert batch.step() or waiting
        steps += 1
        assert steps < 5000
    return rows


def answer(row: Row) -> list[int]:
    return [token.id for token in row.stream]


@pytest.mark.parametrize("shape", ALIKE)
def test_each_has_the_tokens_of_generate_alone(shape: str) -> None:
    """Odd lengths, a beginning shared by all, base and two adapters, longrope's limit and the window crossed."""
    setting = Setting(shape)
    prompts = [*some_prompts((3, 40, 7, 1, 31), shared=0), *some_prompts((3, 29, 18), shared=20)]
    prompts.append(prompts[-1])
    asked = [(prompt, NAMES[i % 3]) for i, prompt in enumerate(prompts)]
    asked += [(prompts[-1], name) for name in NAMES]
    stops = {setting.alone(prompts[0], None, 20, set())[5], setting.alone(prompts[1], "one", 20, set())[9]}
    wanted = [setting.alone(prompt, name, 20, stops) for prompt, name in asked]
    requests = [Request(prompt, 20, adapter=name, stops=frozenset(stops)) for prompt, name in asked]
    for every, rows in ((3, 4), (1, 16)):
        batch = setting.batch(rows)
        made = answered(batch, requests, every)
        ends = [row.stream.end.reason for row in made if row.stream.end]
        assert {"stop", "length"} == set(ends)
        without_stop = [ids[:-1] if ids[-1] in stops else ids for ids in wanted]
        assert [answer(row) for row in made] == without_stop
        assert sum(row.reused for row in made) > 50
        assert not batch.shelves.by_capacity


def test_a_next_turn_computes_what_is_new() -> None:
    setting = Setting("phi-3-mini")
    batch = setting.batch()
    prompt = some_prompts((40,))[0]
    first = answered(batch, [Request(prompt, 9, adapter="one")])[0]
    longer = [*prompt, *answer(first), *some_prompts((5,))[0]]
    second, other = answered(batch, [Request(longer, 9, adapter="one"), Request(longer, 9)])
    assert second.reused == 48  # all but the answer's last token, which was never put in
    assert other.reused == 0  # another adapter has other states
    assert answer(second) == setting.alone(longer, "one", 9, set())
    assert answer(other) == setting.alone(longer, None, 9, set())


def test_short_memory_makes_some_wait_and_changes_no_token() -> None:
    """Memory for about two conversations: the others wait, and one that has begun waits again."""
    setting = Setting("phi-3-mini")
    most = 150 * batching.Layout.of(setting.core).token_bytes
    prompts = some_prompts((20, 21, 22, 23, 24))
    batch = setting.batch(rows=8, most_bytes=most)
    batch.core.config.max_position_embeddings = 4096
    peak, step = 0, batch.step

    def watched() -> bool:
        nonlocal peak
        done = step()
        peak = max(peak, batch.bytes)
        return done

    batch.step = watched  # type: ignore[method-assign]
    rows = answered(batch, [Request(prompt, 30) for prompt in prompts], every=1)
    assert [answer(row) for row in rows] == [setting.alone(prompt, None, 30, set()) for prompt in prompts]
    assert peak <= most


def test_the_same_seed_gives_the_same_tokens_in_any_company() -> None:
    setting = Setting("phi-3-mini")
    prompt = some_prompts((12,))[0]
    drawn = Request(prompt, 25, temperature=1.3, top_p=0.9, seed=7)
    alone = answer(answered(setting.batch(), [drawn])[0])
    others = [Request(p, 20, adapter="two", temperature=2.0) for p in some_prompts((9, 4, 30))]
    among = answered(setting.batch(), [*others, drawn], every=2)[-1]
    assert answer(among) == alone
    other_seed = Request(prompt, 25, temperature=1.3, top_p=0.9, seed=8)
    assert answer(answered(setting.batch(), [other_seed])[0]) != alone


def test_probabilities_limits_and_bias() -> None:
    setting = Setting("phi-3-mini")
    prompt = some_prompts((12,))[0]
    greedy = setting.alone(prompt, None, 6, set())
    row = answered(setting.batch(), [Request(prompt, 6, top_logprobs=3)])[0]
    tokens = list(row.stream)
    assert [token.id for token in tokens] == greedy
    with setting.plain.disable_adapter():
        ids = torch.tensor([[*prompt, *greedy]])
        likely = setting.plain(input_ids=ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    for token, wanted in zip(tokens, likely, strict=True):
        assert token.logprob == pytest.approx(float(wanted[token.id]), abs=1e-4)
        assert [id for id, _ in token.top] == wanted.topk(3).indices.tolist()
    stops = frozenset({greedy[0], greedy[2]})
    assert len(answer(answered(setting.batch(), [Request(prompt, 6, stops=stops)])[0])) == 0
    longer = answer(answered(setting.batch(), [Request(prompt, 6, stops=stops, min_new=3)])[0])
    assert len(longer) >= 3
    assert not stops & set(longer)
    pushed = answer(answered(setting.batch(), [Request(prompt, 4, bias={50: 100.0})])[0])
    assert pushed == [50] * 4
    shy = answer(answered(setting.batch(), [Request(prompt, 4, bias={50: 100.0}, presence=500.0)])[0])
    assert shy.count(50) == 1
    narrow = answer(answered(setting.batch(), [Request(prompt, 6, temperature=1.0, top_p=1e-6)])[0])
    assert narrow == greedy
