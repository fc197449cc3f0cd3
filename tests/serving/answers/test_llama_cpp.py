"""`--backend llama.cpp`: the same API over GGUF files of base and tuned model, and the tokens that `generate` gives."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from helpers import TINY
from phinetune.checkpoints.opened import open_model
from phinetune.config.model import ModelSection
from phinetune.engine.continuous.requests import Request
from phinetune.engine.generate import answer_prompts
from phinetune.errors import ConfigError, ModelError
from phinetune.exporting.checkpoint_source import open_checkpoint
from phinetune.serving.answers.llama_cpp.answerers import LlamaAnswerers
from phinetune.serving.answers.llama_cpp.engine import UNTOLD, body_of, tokens_of
from phinetune.serving.answers.llama_cpp.files import gguf_file, place_of
from phinetune.serving.answers.texts import AnswerText, Decoder
from phinetune.serving.catalogue import ServedModel
from phinetune.serving.settings import make_settings
from phinetune.serving.state import ServerState
from serving.answers.served import TUNED, Served, make_state, serving

pytest.importorskip("xllamacpp", reason="llama.cpp is not installed (phinetune[llamacpp])")
ASKED: list[Any] = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "what is 7 · 8?"}]
LIMIT = 24


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    tiny = ModelSection(path=TINY)
    with serving(tmp_path_factory.mktemp("server"), tiny, gguf="f32") as one:
        yield one


@pytest.mark.parametrize("name", ["tiny", TUNED])
def test_greedy_tokens_are_those_of_generate(served: Served, name: str) -> None:
    """In float32 all of them. Text may differ only at an end whose bytes are no signs, as random models write them."""
    path = TINY if name == "tiny" else str(served.state.folder / "runs" / "demo")
    opened = open_model(path, dtype="float32", device="cpu")
    prompt = opened.encoder.prompt_ids(opened.encoder.prepare(ASKED))
    ours = answer_prompts(opened.model, opened.loaded.tokenizer, [prompt], max_new_tokens=LIMIT)[0]
    asked: dict[str, Any] = {"model": name, "messages": ASKED, "temperature": 0, "max_tokens": LIMIT}
    made = served.client.chat.completions.create(**asked)
    assert made.usage
    assert made.usage.prompt_tokens == len(prompt)
    assert made.usage.completion_tokens == ours.tokens
    engine: Any = served.state.closing[0].__self__.find(name).engine  # type: ignore[attr-defined]
    told = [token.id for token in engine.submit(Request(prompt, LIMIT))]
    assert [(id, own) for id, own in zip(told, ours.ids, strict=True) if id not in (UNTOLD, own)] == []
    assert sum(id != UNTOLD for id in told) > LIMIT // 2
    text = _signs(made.choices[0].message.content or "")
    assert len(text) > 4
    assert _signs(ours.text).startswith(text)
    stream = served.client.chat.completions.create(**asked, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == made.choices[0].message.content


def _signs(text: str) -> str:
    """A text without what stands for broken bytes."""
    return text.replace("\ufffd", "")


def test_completions_responses_seeds_stops_and_schemas(served: Served) -> None:
    client = served.client
    ids = [3 + byte for byte in b"once upon"]
    whole = client.completions.create(model="tiny", prompt=ids, temperature=0, max_tokens=5, logit_bias={"80": 100})
    assert (whole.choices[0].text, whole.choices[0].finish_reason) == ("M" * 5, "length")
    assert client.responses.create(model="tiny", input="hi", max_output_tokens=3).usage
    draws = [
        client.chat.completions.create(model="tiny", messages=ASKED, n=2, seed=seed, max_tokens=12).choices
        for seed in (5, 5, 9)
    ]
    assert draws[0] == draws[1] != draws[2]
    stopped = client.chat.completions.create(
        model="tiny", messages=ASKED, logit_bias={"80": 100}, stop=["MMM"], max_tokens=12
    )
    assert (stopped.choices[0].message.content, stopped.choices[0].finish_reason) == ("", "stop")
    schema = {"type": "object", "properties": {"word": {"enum": ["yes", "no"]}}, "required": ["word"]}
    form: Any = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    kept = client.chat.completions.create(model="tiny", messages=ASKED, response_format=form, seed=2, max_tokens=90)
    assert json.loads(kept.choices[0].message.content or "")["word"] in ("yes", "no")


@pytest.mark.parametrize("more", [{"logprobs": True}, {"presence_penalty": 1}, {"frequency_penalty": 0.5}])
def test_what_llama_cpp_cannot_do_is_refused(served: Served, more: dict[str, Any]) -> None:
    with pytest.raises(openai.BadRequestError, match=r"--backend llama\.cpp") as error:
        served.client.chat.completions.create(model="tiny", messages=ASKED, max_tokens=2, **more)
    assert (error.value.code, error.value.param) == ("unsupported_parameter", next(iter(more)))


def test_a_process_that_dies_is_started_again(served: Served) -> None:
    answerers: Any = served.state.closing[0].__self__  # type: ignore[attr-defined]
    engine = answerers.find("tiny").engine
    os.kill(engine._process.pid, signal.SIGKILL)
    engine._process.wait()
    assert served.client.chat.completions.create(model="tiny", messages=ASKED, max_tokens=2).choices
    assert answerers.find("tiny").engine is not engine


def test_a_deleted_models_files_leave_the_disk(tmp_path: Path) -> None:
    """They may be gigabytes. Those of the base and of other models stay; a file of another type as well."""
    state = make_state(tmp_path, ModelSection(path=TINY))
    LlamaAnswerers(state.models, tmp_path, "f16")
    tuned = place_of(found(state, TUNED))
    made = [gguf_file(tmp_path, path, open_checkpoint(path), kind) for path in (TINY, tuned) for kind in ("f16", "f32")]
    assert [file.is_file() for file in made] == [True] * 4
    assert state.models.delete(TUNED)
    assert [file.is_file() for file in made] == [True, True, False, False]
    assert not state.models.delete(TUNED)
    assert (Path(tuned) / "adapter_model.safetensors").is_file()
    state.store.close()


def test_files_that_no_model_on_offer_is_made_of_leave_at_the_next_start(tmp_path: Path) -> None:
    state = make_state(tmp_path, ModelSection(path=TINY))
    tuned = place_of(found(state, TUNED))
    old = gguf_file(tmp_path, tuned, open_checkpoint(tuned), "f32")
    weights = Path(tuned) / "adapter_model.safetensors"
    os.utime(weights, ns=(1, 1))
    file = gguf_file(tmp_path, tuned, open_checkpoint(tuned), "f32")
    assert [old.exists(), file.exists()] == [False, True]  # the adapter was written anew
    (tmp_path / "gguf" / "of-an-earlier-version-q8_0.gguf").touch()
    (tmp_path / "gguf" / "gone").mkdir()
    LlamaAnswerers(state.models, tmp_path, "f32")
    assert [path.name for path in (tmp_path / "gguf").iterdir()] == [file.parent.name]
    assert file.is_file()
    state.store.close()


def found(state: ServerState, name: str) -> ServedModel:
    model = state.models.find(name)
    assert model is not None
    return model


def test_signs_of_several_tokens_are_told_with_the_last_one() -> None:
    tokens = tokens_of({"content": "é", "tokens": [9], "tokens_predicted": 4}, told=2)
    assert [(token.id, token.text) for token in tokens] == [(UNTOLD, ""), (9, "é")]
    tokenizer = open_model(TINY, device="cpu").loaded.tokenizer
    text = AnswerText(Decoder(tokenizer))
    assert "".join(text.add(token.id, token.text) for token in tokens) + text.add(3 + ord("a")) == "éa"
    last = {"content": "", "tokens": [], "tokens_predicted": 6, "stop": True, "stop_type": "limit"}
    assert len(tokens_of(last, told=4)) == 2
    assert len(tokens_of({**last, "stop_type": "eos"}, told=4)) == 1  # the one that ended it is not of the answer
    assert [token.text for token in tokens_of({"content": "a", "tokens": [5], "tokens_predicted": 1}, told=0)] == [None]


def test_settings_of_the_api_are_all_that_counts() -> None:
    body = body_of(Request([1, 2], 7, temperature=0.5, top_p=0.9, seed=2**32 + 4, bias={3: -100.0}))
    assert (body["n_predict"], body["seed"], body["logit_bias"]) == (7, 5, [[3, -100.0]])
    assert body["samplers"] == ["temperature", "top_p"]
    assert body_of(Request([1], 1))["seed"] != body_of(Request([1], 1))["seed"]


def test_what_a_file_would_not_have_is_refused(tmp_path: Path) -> None:
    base = ModelSection(path=TINY, quantization="nf4", tokenizer="other")
    with pytest.raises(ModelError, match="`tokenizer`, `quantization`"):
        place_of(ServedModel(id="a", created=1, base=base, base_id="a"))

    def settings(backend: str, kind: str | None) -> str | None:
        return make_settings([], "127.0.0.1", 0, tmp_path, (), None, False, backend, kind).gguf

    assert settings("phinetune", None) is None
    assert settings("llama.cpp", None) == "q8_0"
    with pytest.raises(ConfigError, match="give --gguf-type"):
        make_settings([], "127.0.0.1", 0, tmp_path, (), None, False, "llama.cpp", weights="q8_0")
    for backend, kind in (("phinetune", "f16"), ("ollama", None)):
        with pytest.raises(ConfigError):
            settings(backend, kind)
    with pytest.raises(ModelError, match="--type"):
        settings("llama.cpp", "q1")
