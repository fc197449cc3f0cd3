"""Answers in batches are the answers one by one, in the order asked."""

from __future__ import annotations

import torch

from phinetune.checkpoints.load import Loaded
from phinetune.engine.generate import Sampling, answer_prompts, stop_set

PROMPTS = [[263, *range(40, 40 + n), 262, 260] for n in (9, 1, 30, 4, 4)]


def answers(tiny: Loaded, batch_size: int, limit: int = 12, **sampling: float) -> list:
    return answer_prompts(
        tiny.model,
        tiny.tokenizer,
        PROMPTS,
        max_new_tokens=limit,
        batch_size=batch_size,
        sampling=Sampling(**sampling),
    )


def test_batches_of_any_size_answer_alike(tiny: Loaded) -> None:
    alone = answers(tiny, 1)
    assert answers(tiny, 2) == alone
    assert answers(tiny, 5) == alone
    assert len({a.text for a in alone}) > 1


def test_equal_to_generate_of_transformers(tiny: Loaded) -> None:
    ids = torch.tensor([PROMPTS[2]])
    theirs = tiny.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    tail = [i for i in theirs[0, ids.shape[1] :].tolist() if i not in stop_set(tiny.model)]
    assert answers(tiny, 2)[2].text == tiny.tokenizer.decode(tail, skip_special_tokens=True)


def test_an_answer_that_ends_by_itself_is_told_from_one_that_was_cut(tiny: Loaded) -> None:
    cut = answers(tiny, 5, limit=3)
    assert not any(a.stopped for a in cut)
    assert all(a.tokens == 3 for a in cut)
    first = tiny.model.generate(torch.tensor([PROMPTS[0]]), max_new_tokens=2, do_sample=False)[0, -1].item()
    tiny.model.generation_config.eos_token_id = [259, first]
    stopped = answers(tiny, 5, limit=3)[0]
    assert stopped.stopped
    assert stopped.tokens == 1


def test_sampling_follows_the_seed(tiny: Loaded) -> None:
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        drawn.append([a.text for a in answers(tiny, 2, temperature=1.0, top_p=0.9, top_k=50)])
    assert drawn[0] == drawn[1] != drawn[2]
