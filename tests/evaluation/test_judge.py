"""A judge is asked over real HTTP: both orders, what is sent where, and every way in which an endpoint fails."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from helpers import chat, tiny_config, write_jsonl
from phinetune.api.evaluate import evaluate
from phinetune.api.train import train_config
from phinetune.config.evaluation import EvaluationSection
from phinetune.config.run import RunConfig, dump_config, make_config
from phinetune.errors import ConfigError
from phinetune.evaluation import judge_client
from phinetune.evaluation.answering import Question
from phinetune.evaluation.judge import check_judges, judge_answers, judge_notices, letter_of
from phinetune.evaluation.judge_client import Reply
from phinetune.screen.console import Console

KEY = "kq-secret-of-the-test-123456"
Made = tuple[int, dict[str, str], bytes]


class Endpoint:
    """A small server of chat completions. `answer` makes a reply of a request's body."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, dict[str, Any], dict[str, str]]] = []
        self.answer: Callable[[dict[str, Any]], Made] = lambda body: said("[[tie]]")
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.requests.append((self.path, body, dict(self.headers)))
                status, headers, content = outer.answer(body)
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(content))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: Any) -> None:
                """Nothing on the terminal."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()


def said(text: str) -> Made:
    return 200, {}, json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}).encode()


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[Endpoint]:
    monkeypatch.setattr(judge_client, "FIRST_WAIT", 0.01)
    made = Endpoint()
    yield made
    made.server.shutdown()
    made.server.server_close()


def section(url: str, **more: Any) -> EvaluationSection:
    return EvaluationSection(metrics=["bleu", {"name": "judge", "url": url, "model": "m", **more}])


def questions(count: int) -> list[Question]:
    turns = [{"role": "user", "content": "What is it?"}]
    return [Question([1], turns, "What is it?", f"The reference {i}", i) for i in range(count)]  # type: ignore[arg-type]


def asked(one: EvaluationSection, base: list[str], tuned: list[str]) -> dict[str, Any]:
    tree: dict[str, Any] = judge_answers(one, questions(len(base)), base, tuned)["judge"]
    json.dumps(tree)
    return tree


def prefers(words: str) -> Callable[[dict[str, Any]], Made]:
    """A judge that names the answer that holds some words, and a tie where both do or none does."""

    def answer(body: dict[str, Any]) -> Made:
        text = body["messages"][-1]["content"]
        a, b = (text.split(f"<answer_{x}>")[1].split(f"</answer_{x}>")[0] for x in "ab")
        holds = words in a, words in b
        return said("Reasons. [[A]] would be wrong?\n" + {(1, 0): "[[A]]", (0, 1): "[[B]]"}.get(holds, "[[tie]]"))

    return answer


def test_both_orders_are_asked_and_counted(endpoint: Endpoint) -> None:
    endpoint.answer = prefers("good")
    base, tuned = ["bad", "good", "bad", "same", "x"], ["good", "bad", "good", "same ", "y"]
    tree = asked(section(endpoint.url), base, tuned)
    assert (tree["won"], tree["lost"], tree["even"], tree["equal"], tree["no_verdict"]) == (2, 1, 2, 1, 0)
    assert tree["rate"] == 60.0
    assert tree["low"] < 60 < tree["high"]
    assert tree["agreement"] == 100.0
    assert tree["first"] == 50.0
    assert tree["verdicts"][:4] == [["tuned", "tuned"], ["base", "base"], ["tuned", "tuned"], ["tie", "tie"]]
    assert len(endpoint.requests) == 8  # equal answers are not asked about
    path, body, headers = endpoint.requests[0]
    assert path == "/v1/chat/completions"
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("m", 0.0, 512)
    assert "The reference" in body["messages"][-1]["content"]
    assert "authorization" not in {name.lower() for name in headers}
    assert tree["text"].startswith("tuned wins 60% against base by judge (95% interval")
    assert tree["look"] == []


def test_a_judge_that_prefers_a_place_gives_ties_and_a_line(endpoint: Endpoint) -> None:
    endpoint.answer = lambda body: said("A")
    tree = asked(section(endpoint.url), ["a"] * 6, ["b"] * 6)
    assert (tree["even"], tree["rate"], tree["agreement"], tree["first"]) == (6, 50.0, 0.0, 100.0)
    assert "agree on 0% only, and the answer shown first won 100%" in tree["look"][0]


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("[[A]]", "A"),
        ("A is [[A]]? No.\n[[ b ]]", "B"),
        ("[[tie]]", "TIE"),
        ("[[C]]", "TIE"),
        ("Both are fine.\nVerdict: tie", "TIE"),
        ("**B**", "B"),
        ("A good try", None),
        ("", None),
        ("I can't say.", None),
    ],
)
def test_verdicts_are_read(text: str, letter: str | None) -> None:
    assert letter_of(Reply(text)) == letter


def test_a_prompt_of_ones_own_has_its_fields_and_no_reference_unless_it_names_it(endpoint: Endpoint) -> None:
    endpoint.answer = lambda body: said("[[A]]")
    asked(section(endpoint.url, prompt="{{Q}} {question} | {answer_a} | {answer_b}"), ["one {question}"], ["two"])
    contents = sorted(body["messages"][-1]["content"] for _, body, _ in endpoint.requests)
    assert contents[0].startswith("{Q} What is it? | one {question} | two\n\nEnd with one line")
    assert contents[1].startswith("{Q} What is it? | two | one {question}\n\n")


def test_failures_that_pass_are_tried_again_and_the_wait_asked_for_is_kept(endpoint: Endpoint) -> None:
    replies = [(429, {"Retry-After": "0"}, b"{}"), (503, {}, b"busy"), said("[[B]]"), said("[[A]]")]
    endpoint.answer = lambda body: replies.pop(0)
    tree = asked(section(endpoint.url, parallel=1), ["a"], ["b"])
    assert (tree["won"], tree["no_verdict"], len(endpoint.requests)) == (1, 0, 4)


FAILURES: dict[str, tuple[Made, int, str]] = {
    "key": (
        (401, {}, b'{"error": {"message": "Incorrect key ' + KEY.encode() + b'"}}'),
        1,
        "the key was refused (401)",
    ),
    "model": ((404, {}, b'{"detail": "no model m"}'), 1, "no such address or model (404): no model m"),
    "moved": ((302, {"Location": "http://192.0.2.1/"}, b""), 1, "another address (302), which is not followed"),
    "broken": ((500, {}, b"<html>oops</html>"), 2, "the endpoint failed (500): <html>oops</html>"),
    "busy": ((429, {}, b'{"error": "slow down"}'), 2, "too many requests (429): slow down"),
    "refused": ((400, {}, b'{"error": "max_tokens is odd, ' + KEY.encode() + b'"}'), 1, "refused (400): max_tokens is"),
    "html": ((200, {}, b"<html>"), 1, "the reply is no chat completion"),
    "odd": ((200, {}, b'{"choices": [{"message": {"content": null}}]}'), 1, "the reply has no text"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_every_failure_is_a_sentence_and_counts_as_no_verdict(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv("JUDGE_OF_THE_TEST", KEY)
    reply, tries, words = FAILURES[name]
    endpoint.answer = lambda body: reply
    one = section(endpoint.url, key_env="JUDGE_OF_THE_TEST", retries=1, parallel=1)
    tree = asked(one, ["a"] * 9, ["b"] * 9)
    assert (tree["rate"], tree["low"], tree["no_verdict"]) == (None, None, 9)
    assert tree["text"] == "judge gave no verdict on any of 9 prompts"
    assert any(words in line for line in tree["look"]), tree["look"]
    assert KEY not in json.dumps(tree)
    final = name in ("key", "model", "moved")  # the same for every prompt, so it is asked once
    assert len(endpoint.requests) == (1 if final else 5 * 2 * tries)
    assert any("not asked, since the requests before it failed" in line for line in tree["look"])


def test_replies_without_a_verdict_are_counted_and_all_prompts_are_asked(endpoint: Endpoint) -> None:
    endpoint.answer = lambda body: said("I would rather not say.")
    tree = asked(section(endpoint.url), ["a"] * 7, ["b"] * 7)
    assert (tree["no_verdict"], len(endpoint.requests)) == (7, 14)
    assert tree["look"] == ["judge: 7 × a reply without a verdict"]


def test_an_endpoint_that_hangs_or_is_not_there_is_given_up(endpoint: Endpoint) -> None:
    endpoint.answer = lambda body: (time.sleep(0.5), said("[[A]]"))[1]
    tree = asked(section(endpoint.url, timeout=0.1, retries=0), ["a"], ["b"])
    assert "no answer within 0.1 s" in tree["look"][0]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
        tree = asked(section(url, retries=1), ["a"], ["b"])
    assert "the connection failed" in tree["look"][0]


def test_what_goes_where_is_said(tmp_path: Path) -> None:
    (tmp_path / "key").write_text(f"{KEY}\n")
    (here,) = judge_notices(section("http://127.0.0.1:8000/v1"))
    assert "the chats' own go to http://127.0.0.1:8000/v1/chat/completions (this machine), model m, without" in here
    (there,) = judge_notices(section("https://api.example.com/v1/", reference=False, key_file=str(tmp_path / "key")))
    assert "prompts and both answers go to https://api.example.com/v1/chat/completions (another machine" in there
    assert KEY not in there
    (open_one,) = judge_notices(section("http://10.0.0.2:1/v1"))
    assert "another machine, 10.0.0.2; not encrypted on its way" in open_one
    assert judge_notices(EvaluationSection()) == []


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"name": "judge", "model": "m"}, "name the endpoint in `url`"),
        ({"url": "http://a/v1"}, "model"),
        ({"url": "http://a/v1", "base_url": "http://b", "model": "m"}, "are the same"),
        ({"url": "http://a/v1", "model": "m", "api_key": KEY}, "a key does not belong into a configuration"),
        ({"url": f"http://me:{KEY}@a/v1", "model": "m"}, "an address with a password in it"),
        ({"url": f"http://a/v1?key={KEY}", "model": "m"}, "without `?` and `#`"),
        ({"url": "ftp://a", "model": "m"}, "an address such as"),
        ({"url": "http://a", "model": "m", "prompt": "{answer_a}"}, "{answer_b} is missing"),
        ({"url": "http://a", "model": "m", "prompt": "{answer_a}{answer_b}{secret}"}, "there is no {secret}"),
        ({"url": "http://a", "model": "m", "key_env": "A", "key_file": "b"}, "both say where the key is"),
        ({"url": "http://a", "model": "m", "tiemout": 3}, "did you mean `timeout`?"),
        ({"url": "http://a", "model": "m", "name": "bleu"}, "`bleu` is the name of another number"),
    ],
)
def test_a_bad_entry_is_told_without_its_key(entry: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_config({"evaluation": {"metrics": [entry]}})
    assert words in str(caught.value)
    assert KEY not in str(caught.value)


def test_a_missing_key_is_told_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    with pytest.raises(ConfigError, match="the environment variable NO_SUCH_KEY is not set"):
        check_judges(section("http://a", key_env="NO_SUCH_KEY"))
    with pytest.raises(ConfigError, match="key_file"):
        check_judges(section("http://a", key_file=str(tmp_path / "none")))
    (tmp_path / "two").write_text("one\ntwo")
    with pytest.raises(ConfigError, match="one line of ASCII"):
        check_judges(section("http://a", key_file=str(tmp_path / "two")))
    with pytest.raises(ConfigError, match="generate: false"):
        check_judges(section("http://a").model_copy(update={"generate": False}))


def run_config(tmp_path: Path, endpoint: Endpoint) -> RunConfig:
    rows = [chat(f"How many are {i} and {i}?", f"They are {2 * i}.") for i in range(12)]
    config = tiny_config(write_jsonl(tmp_path / "chats.jsonl", rows), tmp_path / "run", learning_rate=0.1)
    judge = {"name": "judge", "base_url": endpoint.url, "model": "small", "key_env": "JUDGE_OF_THE_TEST"}
    tree = config.model_dump()
    tree["evaluation"] |= {"metrics": ["bleu", judge], "neutral": False}
    return make_config(tree)


def test_a_run_asks_its_judge_and_its_key_is_written_nowhere(
    endpoint: Endpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, console: Console, caplog: Any
) -> None:
    monkeypatch.setenv("JUDGE_OF_THE_TEST", KEY)
    endpoint.answer = lambda body: said("[[A]]")
    config = run_config(tmp_path, endpoint)
    made = train_config(config, console)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert shown.index("Judge `judge`: the held-out prompts") < shown.index("step 1/6")
    assert f"{endpoint.url}/chat/completions (this machine), model small" in shown
    tree = json.loads((made.path / "results.json").read_text())["judged"]["judge"]
    assert tree["prompts"] == 3
    assert tree["even"] == 3
    assert {headers["Authorization"] for _, _, headers in endpoint.requests} == {f"Bearer {KEY}"}
    for file in ("README.md", "report.html"):
        assert "against base by judge" in (made.path / file).read_text()
    assert KEY not in dump_config(config) + shown + caplog.text
    for place in made.path.rglob("*"):
        assert not place.is_file() or KEY.encode() not in place.read_bytes(), place
    # A run may be anyone's: its judge is not asked by those who evaluate it, unless they name it.
    before = len(endpoint.requests)
    found = evaluate(made.path, console=console, record=False)
    assert (found.judged, len(endpoint.requests)) == ({}, before)
    assert "Left out: judge. A function or a judge that" in console.file.getvalue()  # type: ignore[attr-defined]
    named = {"metrics": [{"url": endpoint.url, "model": "small"}], "max_prompts": 1, "neutral": False}
    found = evaluate(made.path, evaluation=named, console=console, record=False)
    assert found.to_tree()["judged"]["judge"]["prompts"] == 1
    assert len(endpoint.requests) in (before, before + 2)
    assert "Authorization" not in endpoint.requests[-1][2] or len(endpoint.requests) == before
