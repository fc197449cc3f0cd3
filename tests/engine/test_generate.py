"""Answers in batches are the answers one by one, in the order asked."""

from __future__ import annotations

import pytest
import torch

from phinetune.checkpoints.load import Loaded
from phinetune.engine.generate import Sampling, answer_prompts, check_prompts, stop_set
from phinetune.errors import ConfigError

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


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1e-6}], ids=["our decoding", "transformers' generate"])
def test_an_answer_ends_where_the_models_positions_end(
    tiny: Loaded, sampling: dict[str, float], caplog: pytest.LogCaptureFixture
) -> None:
    whole = answers(tiny, 5, **sampling)
    tiny.model.config.max_position_embeddings = 36
    limited = answers(tiny, 5, **sampling)
    assert [a.tokens for a in limited] == [min(a.tokens, 36 - len(p)) for a, p in zip(whole, PROMPTS, strict=True)]
    assert all(w.text.startswith(a.text) for a, w in zip(limited, whole, strict=True))
    assert "1 of 5 prompts leave room for 3 tokens or more in the model's 36 positions, not for 12" in caplog.text


def test_a_prompt_beyond_the_models_positions_is_refused(tiny: Loaded) -> None:
    tiny.model.config.max_position_embeddings = 33
    with pytest.raises(ConfigError, match="the prompt has 33 tokens, and the model has positions for 33"):
        answers(tiny, 5)


def test_prompts_that_fit_are_told_from_those_that_do_not() -> None:
    check_prompts([[1] * 9], 10)
    with pytest.raises(ConfigError) as caught:
        check_prompts([[1] * 10, [1] * 9, [1] * 12], 10)
    assert [problem[:26] for problem in caught.value.problems] == [
        "the prompt has 10 tokens, ",
        "the prompt has 12 tokens, ",
    ]
