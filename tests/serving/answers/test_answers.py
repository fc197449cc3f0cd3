"""Chat completions, completions and responses, as the official client uses them, against a real server."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from pydantic import BaseModel

from helpers import DEVICE, TINY
from phinetune.checkpoints.opened import open_model
from phinetune.engine.generate import answer_prompts
from phinetune.engine.q8_linear import Q8Linear
from serving.answers.served import TUNED, Served, serving

ASKED: list[Any] = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "what is 7 · 8?"}]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(tmp_path_factory.mktemp("server"), most_rows=16, most_waiting=16) as one:
        yield one


@pytest.fixture(scope="module")
def greedy(served: Served) -> dict[str, str]:
    """What `generate` answers, by the model's name."""
    made = {}
    for name, path in (("tiny", TINY), (TUNED, str(served.state.folder / "runs" / "demo"))):
        opened = open_model(path, dtype="float32", device=DEVICE)
        prompt = opened.encoder.prompt_ids(opened.encoder.prepare(ASKED))
        made[name] = answer_prompts(opened.model, opened.loaded.tokenizer, [prompt], max_new_tokens=24)[0].text
    return made


def chunks_of(stream: Any) -> tuple[str, list[Any]]:
    chunks = list(stream)
    return "".join(c.choices[0].delta.content or "" for c in chunks if c.choices), chunks


@pytest.mark.parametrize("name", ["tiny", TUNED])
def test_greedy_chat_is_what_generate_answers(served: Served, greedy: dict[str, str], name: str) -> None:
    made = served.client.chat.completions.create(model=name, messages=ASKED, temperature=0, max_completion_tokens=24)
    assert made.object == "chat.completion"
    assert made.choices[0].message.content == greedy[name]
    assert made.choices[0].finish_reason in ("stop", "length")
    assert made.usage
    assert made.usage.total_tokens == made.usage.prompt_tokens + made.usage.completion_tokens
    stream = served.client.chat.completions.create(
        model=name, messages=ASKED, temperature=0, max_tokens=24, stream=True, stream_options={"include_usage": True}
    )
    text, chunks = chunks_of(stream)
    assert text == greedy[name]
    assert len(chunks) > 5
    assert chunks[-1].usage.completion_tokens == made.usage.completion_tokens
    assert chunks[-2].choices[0].finish_reason == made.choices[0].finish_reason
    assert greedy["tiny"] != greedy[TUNED]


def test_a_base_in_q8_0_answers_as_generate_on_such_a_one(tmp_path: Path) -> None:
    if DEVICE != "cpu":
        pytest.skip("q8_0 is for CPUs")
    with serving(tmp_path, weights="q8_0") as served:
        for name, path in (("tiny", TINY), (TUNED, str(served.state.folder / "runs" / "demo"))):
            opened = open_model(path, weights="q8_0", dtype="float32", device=DEVICE)
            assert torch.int8 in {parameter.dtype for parameter in opened.model.parameters()}
            prompt = opened.encoder.prompt_ids(opened.encoder.prepare(ASKED))
            alone = answer_prompts(opened.model, opened.loaded.tokenizer, [prompt], max_new_tokens=24)[0].text
            made = served.client.chat.completions.create(model=name, messages=ASKED, temperature=0, max_tokens=24)
            assert made.choices[0].message.content == alone
        engine: Any = served.state.closing[0].__self__  # type: ignore[attr-defined]
        assert {type(base.loaded.model.lm_head) for base in engine._bases.values()} == {Q8Linear}


def test_many_clients_at_once_get_their_own(served: Served, greedy: dict[str, str]) -> None:
    """32 stream together, base and tuned."""

    def ask(i: int) -> bool:
        name = ("tiny", TUNED)[i % 2]
        stream = served.client.chat.completions.create(
            model=name, messages=ASKED, temperature=0, max_tokens=24, stream=True
        )
        return chunks_of(stream)[0] == greedy[name]

    with ThreadPoolExecutor(32) as pool:
        assert all(pool.map(ask, range(32)))


def test_choices_seeds_and_stops(served: Served, greedy: dict[str, str]) -> None:
    def ask(**options: Any) -> Any:
        return served.client.chat.completions.create(model="tiny", messages=ASKED, max_tokens=16, **options)

    first, again, other = ask(n=3, seed=5), ask(n=3, seed=5), ask(n=3, seed=77)
    texts = [[choice.message.content for choice in made.choices] for made in (first, again, other)]
    assert texts[0] == texts[1] != texts[2]
    assert len(set(texts[0])) == 3
    assert [choice.index for choice in first.choices] == [0, 1, 2]
    stop = greedy["tiny"][5:7]
    stopped = ask(temperature=0, stop=["never-there", stop]).choices[0]
    assert stopped.message.content == greedy["tiny"][: greedy["tiny"].index(stop)]
    assert stopped.finish_reason == "stop"
    assert ask(temperature=0, logit_bias={"80": 100}).choices[0].message.content == "M" * 16


def test_logprobs_of_each_token(served: Served) -> None:
    made = served.client.chat.completions.create(
        model="tiny", messages=ASKED, temperature=0, max_tokens=8, logprobs=True, top_logprobs=2
    )
    told = made.choices[0].logprobs
    assert told
    assert told.content
    assert made.usage
    assert len(told.content) == made.usage.completion_tokens
    for token in told.content:
        assert token.logprob == token.top_logprobs[0].logprob <= 0
        assert token.token == token.top_logprobs[0].token
    whole = b"".join(bytes(token.bytes or []) for token in told.content if token.token != "<s>")  # a special one
    assert whole.decode(errors="replace") == made.choices[0].message.content
    stream = served.client.chat.completions.create(
        model="tiny", messages=ASKED, temperature=0, max_tokens=8, logprobs=True, top_logprobs=2, stream=True
    )
    streamed = [t for c in stream if c.choices[0].logprobs for t in c.choices[0].logprobs.content or []]
    assert [t.bytes for t in streamed] == [t.bytes for t in told.content]


class Place(BaseModel):
    city: str
    people: int
    coast: bool


def test_json_is_kept(served: Served) -> None:
    """The tiny model writes noise; what comes is JSON of the schema all the same, in the client's own class."""
    made = served.client.chat.completions.parse(
        model="tiny", messages=ASKED, response_format=Place, max_tokens=900, temperature=0.7, seed=1
    )
    if made.choices[0].finish_reason == "stop":
        assert isinstance(made.choices[0].message.parsed, Place)
    schema = {"type": "object", "properties": {"word": {"enum": ["yes", "no"]}}, "required": ["word"]}
    schema["additionalProperties"] = False  # type: ignore[assignment]
    form: Any = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}
    for name in ("tiny", TUNED):
        whole = served.client.chat.completions.create(model=name, messages=ASKED, response_format=form, seed=2)
        assert json.loads(whole.choices[0].message.content or "")["word"] in ("yes", "no")
        assert whole.choices[0].finish_reason == "stop"
    free = served.client.chat.completions.create(
        model="tiny", messages=ASKED, response_format={"type": "json_object"}, max_tokens=40, seed=3
    )
    assert (free.choices[0].message.content or "").startswith("{")
    answer = served.client.responses.create(
        model="tiny", input="hi", text={"format": {"type": "json_schema", "name": "answer", "schema": schema}}
    )
    assert json.loads(answer.output_text)["word"] in ("yes", "no")
    for bad in ({"type": "nonsense"}, {"$ref": "file:///etc/passwd"}, {"$ref": "http://127.0.0.1:1/x.json"}):
        form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": bad}}
        with pytest.raises(openai.BadRequestError, match="Invalid schema"):
            served.client.chat.completions.create(model="tiny", messages=ASKED, response_format=form)


def test_completions(served: Served) -> None:
    made = served.client.completions.create(model=TUNED, prompt="once upon", temperature=0, logprobs=2)
    assert made.usage
    assert made.usage.completion_tokens == 16
    assert made.choices[0].finish_reason == "length"
    assert made.choices[0].logprobs
    assert len(made.choices[0].logprobs.tokens or []) == 16
    stream = served.client.completions.create(model=TUNED, prompt="once upon", temperature=0, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == made.choices[0].text
    ids = [3 + byte for byte in b"once upon"]
    both = served.client.completions.create(model=TUNED, prompt=[ids, ids], temperature=0, echo=True)
    assert [choice.text for choice in both.choices] == ["once upon" + made.choices[0].text] * 2


def test_responses_go_on_from_one_another(served: Served) -> None:
    client = served.client
    first = client.responses.create(
        model="tiny", input="hello", instructions="be brief", temperature=0, max_output_tokens=12
    )
    assert first.status == "incomplete"
    assert first.incomplete_details
    assert first.incomplete_details.reason == "max_output_tokens"
    assert first.usage
    assert first.usage.output_tokens == 12
    kinds, text, last = [], "", None
    with client.responses.stream(
        model="tiny", input="hello", instructions="be brief", temperature=0, max_output_tokens=12
    ) as stream:
        for one in stream:
            kinds.append(one.type)
            text += one.delta if one.type == "response.output_text.delta" else ""
            last = one
    assert text == first.output_text
    assert [kind for kind in dict.fromkeys(kinds) if "delta" not in kind] == [
        *("response.created", "response.in_progress", "response.output_item.added", "response.content_part.added"),
        *("response.output_text.done", "response.content_part.done", "response.output_item.done"),
        "response.incomplete",
    ]
    assert last
    assert last.response.output_text == text  # type: ignore[union-attr]
    second = client.responses.create(
        model="tiny", input="more", previous_response_id=first.id, temperature=0, max_output_tokens=4
    )
    chat: list[Any] = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": first.output_text}]
    by_hand = client.responses.create(
        model="tiny", input=[*chat, {"role": "user", "content": "more"}], temperature=0, max_output_tokens=4
    )
    assert second.output_text == by_hand.output_text
    with pytest.raises(openai.BadRequestError, match="resp_none"):
        client.responses.create(model="tiny", input="more", previous_response_id="resp_none")


REFUSED = {
    "unknown_parameter": {"extra_body": {"colour": "red"}},
    "unsupported_parameter": {"extra_body": {"audio": {"voice": "x"}}},
    "invalid_value": {"temperature": 3},
    "context_length_exceeded": {"messages": [{"role": "user", "content": "x" * 5000}]},
    "model_not_found": {"model": "gpt-5"},
}


@pytest.mark.parametrize("code", REFUSED)
def test_what_is_refused_has_the_apis_form(served: Served, code: str) -> None:
    call: Any = {"model": "tiny", "messages": ASKED, **REFUSED[code]}
    with pytest.raises((openai.BadRequestError, openai.NotFoundError)) as error:
        served.client.chat.completions.create(**call)
    assert error.value.code == code
    assert error.value.type == "invalid_request_error"
    assert error.value.param or code == "invalid_value"


UNKNOWN: dict[str, tuple[str, dict[str, Any]]] = {
    "stream_options.foo": ("chat/completions", {"stream": True, "stream_options": {"foo": 1}}),
    "response_format.foo": ("chat/completions", {"response_format": {"type": "json_object", "foo": 1}}),
    "response_format.json_schema.shema": (
        "chat/completions",
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "shema": {}}}},
    ),
    "text.foo": ("responses", {"text": {"foo": 1}}),
    "text.format.shema": ("responses", {"text": {"format": {"type": "json_schema", "name": "a", "shema": {}}}}),
}


@pytest.mark.parametrize("param", UNKNOWN)
def test_an_unknown_parameter_within_another_is_refused_by_its_path(served: Served, param: str) -> None:
    path, more = UNKNOWN[param]
    body = {"model": "tiny", "input": "hi"} if path == "responses" else {"model": "tiny", "messages": ASKED}
    with pytest.raises(openai.BadRequestError) as error:
        served.client.post(f"/{path}", cast_to=object, body={**body, **more})
    assert (error.value.code, error.value.param) == ("unknown_parameter", param)
    assert param in error.value.message


def test_other_bad_requests_say_what_is_wrong(served: Served) -> None:
    def ask(**call: Any) -> Any:
        return served.client.chat.completions.create(**{"model": "tiny", "messages": ASKED, "max_tokens": 2, **call})

    tool: Any = {"type": "function", "function": {"name": "f", "parameters": {}}}
    image: Any = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///x"}}]}]
    for call, words in (
        ({"tools": [tool]}, "has no place for tools"),
        ({"messages": image}, "text alone"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "Supported values"),
        ({"messages": []}, "messages"),
        ({"top_logprobs": 2}, "needs 'logprobs'"),
        ({"stop": ["a"] * 5}, "up to 4"),
        ({"logit_bias": {"99999": 1}}, "no token id"),
        ({"logit_bias": {"9" * 5000: 1}}, "no token id"),
        ({"stream_options": {"include_usage": True}}, "for 'stream'"),
    ):
        with pytest.raises(openai.BadRequestError, match=words):
            ask(**call)
    assert ask(user="me", metadata={"a": "b"}, service_tier="auto").choices
    parts: Any = [{"role": "user", "content": [{"type": "text", "text": "what"}, {"type": "text", "text": " now"}]}]
    one: Any = [{"role": "user", "content": "what now"}]
    assert ask(messages=parts, temperature=0).choices[0] == ask(messages=one, temperature=0).choices[0]


def test_who_goes_away_frees_the_place(served: Served) -> None:
    """A client that closes its stream, and one that gives up waiting."""
    long: dict[str, Any] = {"model": "tiny", "messages": ASKED, "logit_bias": {"80": 100}}
    stream = served.client.chat.completions.create(**long, stream=True)
    next(iter(stream))
    stream.close()
    with pytest.raises(openai.APITimeoutError):
        served.client.with_options(timeout=0.3).chat.completions.create(**long)
    deadline = time.monotonic() + 30
    while any(load.conversations for load in _loads(served).values()) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(load.conversations for load in _loads(served).values())


def _loads(served: Served) -> Any:
    return served.state.closing[0].__self__.loads()


def test_an_adapter_that_leaves_between_finding_and_asking_is_told(served: Served) -> None:
    answerer = served.state.closing[0].__self__.find(TUNED)  # type: ignore[attr-defined]
    adapter = answerer.engine._adapters[answerer.adapter]
    answerer.engine.drop_adapter(answerer.adapter)
    served.client.chat.completions.create(model="tiny", messages=ASKED, max_tokens=1)  # it has left by then
    with pytest.raises(openai.InternalServerError, match="just left the memory"):
        served.client.chat.completions.create(model=TUNED, messages=ASKED)
    answerer.engine.add_adapter(answerer.adapter, adapter)
    assert served.client.chat.completions.create(model=TUNED, messages=ASKED, max_tokens=1).choices


def test_more_than_can_wait_get_a_429(served: Served) -> None:
    long: dict[str, Any] = {"model": "tiny", "messages": ASKED, "logit_bias": {"80": 100}, "max_tokens": 120}
    codes: list[int] = []
    lock = threading.Lock()

    def ask(_: int) -> None:
        try:
            served.client.chat.completions.create(**long)
            code = 200
        except openai.RateLimitError as error:
            code = error.status_code
        with lock:
            codes.append(code)

    with ThreadPoolExecutor(48) as pool:
        list(pool.map(ask, range(48)))
    assert set(codes) == {200, 429}
    assert codes.count(200) >= 32


def test_a_model_whose_files_are_gone_or_unfit_is_told(served: Served, tmp_path: Path) -> None:
    from phinetune.config.model import ModelSection
    from serving.answers.served import write_adapter

    tiny = ModelSection(path=TINY, dtype="float32", device=DEVICE)
    dora = write_adapter(served.state.folder / "runs" / "dora", tiny, use_dora=True)
    served.state.models.add("ft:tiny:phinetune:dora:x", tiny.model_dump(), dora, "ftjob-x")
    with pytest.raises(openai.InternalServerError, match="phinetune merge"):
        served.client.chat.completions.create(model="ft:tiny:phinetune:dora:x", messages=ASKED)
