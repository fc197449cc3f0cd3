"""The answering engine from other threads: many at once, too many, cancelled, failed, closed."""

from __future__ import annotations

import threading

import pytest
from torch import Tensor

from engine.continuous.test_batch import Setting
from engine.test_greedy_decode import some_prompts
from phinetune.engine.continuous.answer_engine import AnswerEngine, Busy, TooLong
from phinetune.engine.continuous.requests import Request


@pytest.fixture(scope="module")
def setting() -> Setting:
    return Setting("phi-3-mini")


def test_from_many_threads_each_gets_its_own_answer(setting: Setting) -> None:
    engine = AnswerEngine(setting.core, most_rows=4, cache_bytes=1 << 28)
    engine.add_adapter("one", setting.adapters["one"])
    prompts = some_prompts((3, 40, 7, 29, 18, 1, 31))
    got: dict[int, list[int]] = {}

    def ask(i: int) -> None:
        stream = engine.submit(Request(prompts[i], 8, adapter="one" if i % 2 else None))
        got[i] = [token.id for token in stream]

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(prompts))]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    for i, prompt in enumerate(prompts):
        assert got[i] == setting.alone(prompt, "one" if i % 2 else None, 8, set())
    assert engine.load.answered_tokens == 8 * len(prompts)
    engine.close()
    with pytest.raises(RuntimeError, match="closed"):
        engine.submit(Request([1], 1))


def test_too_many_too_long_unknown_and_cancelled(setting: Setting) -> None:
    engine = AnswerEngine(setting.core, most_rows=1, most_waiting=2, cache_bytes=1 << 28)
    prompt = some_prompts((9,))[0]
    with pytest.raises(TooLong, match="has 5000 tokens"):
        engine.submit(Request([5] * 5000, 1))
    with pytest.raises(KeyError, match="nobody"):
        engine.submit(Request(prompt, 1, adapter="nobody"))
    first = engine.submit(Request(prompt, 4000))
    next(iter(first))
    rest = [engine.submit(Request(prompt, 4000)) for _ in range(2)]
    with pytest.raises(Busy):
        engine.submit(Request(prompt, 1))
    for stream in (*rest, first):
        stream.cancel()
    for stream in (*rest, first):
        list(stream)
        assert stream.end
        assert stream.end.reason == "cancelled"
    assert len(list(engine.submit(Request(prompt, 3)))) == 3  # it goes on
    engine.close()


def test_a_step_that_fails_ends_its_answers_and_no_others(setting: Setting) -> None:
    engine = AnswerEngine(setting.core, cache_bytes=1 << 28)
    broken = engine.submit(Request([10_000], 3))  # no such token: the embedding refuses it
    assert list(broken) == []
    assert broken.end
    assert broken.end.reason == "failed"
    assert isinstance(broken.end.error, IndexError)
    prompt = some_prompts((9,))[0]
    assert [t.id for t in engine.submit(Request(prompt, 5))] == setting.alone(prompt, None, 5, set())
    engine.close()


def test_an_adapter_that_is_added_again_stays(setting: Setting) -> None:
    """It was to leave once its answers had ended, and was asked for again before."""
    engine = AnswerEngine(setting.core, cache_bytes=1 << 28)
    prompt = some_prompts((9,))[0]
    wanted = setting.alone(prompt, "one", 3, set())
    for again in (True, False):
        engine.add_adapter("one", setting.adapters["one"])
        long = engine.submit(Request(prompt, 4000, adapter="one"))
        next(iter(long))
        engine.drop_adapter("one")
        list(engine.submit(Request(prompt, 1)))  # the engine has seen the wish, and put it off
        if again:
            engine.add_adapter("one", setting.adapters["one"])
        long.cancel()
        list(long)
        list(engine.submit(Request(prompt, 1)))  # what was put off has been done
        assert engine.has_adapter("one") == again
        if again:
            assert [token.id for token in engine.submit(Request(prompt, 3, adapter="one"))] == wanted
    with pytest.raises(KeyError):
        engine.submit(Request(prompt, 3, adapter="one"))
    engine.close()


class Broken:
    """A grammar that fails at its third token."""

    def __init__(self) -> None:
        self.taken = 0

    def mask_(self, logits: Tensor) -> None:
        if self.taken == 2:
            raise RuntimeError("lost")

    def take(self, token: int) -> bool:
        self.taken += 1
        return False


def test_a_grammar_that_fails_ends_its_own_answer(setting: Setting) -> None:
    engine = AnswerEngine(setting.core, cache_bytes=1 << 28)
    prompt, other = some_prompts((9, 12))
    streams = [engine.submit(Request(prompt, 6, constraint=Broken)), engine.submit(Request(other, 6))]
    answers = [[token.id for token in stream] for stream in streams]
    assert answers[0] == setting.alone(prompt, None, 2, set())
    assert streams[0].end
    assert streams[0].end.reason == "failed"
    assert str(streams[0].end.error) == "lost"
    assert answers[1] == setting.alone(other, None, 6, set())
    engine.close()
