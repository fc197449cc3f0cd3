"""What the API takes and refuses, by the official client and by hand."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from phinetune.serving.settings import Limits
from phinetune.serving.state import ServerState
from serving.serving_helpers import KEY, ask, keep_file, threaded

Served = tuple[ServerState, openai.OpenAI]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    limits = Limits(body=20_000, file=5_000)
    with threaded(tmp_path_factory.mktemp("served"), limits=limits) as made:
        keep_file(made[0], "file-chat")
        keep_file(made[0], "file-pairs", "preference")
        yield made


@pytest.mark.parametrize(
    ("more", "status", "param", "code"),
    [
        ({"model": "gpt-4o-mini"}, 404, "model", "model_not_found"),
        ({"training_file": "file-none"}, 400, "training_file", "file_not_found"),
        ({"training_file": "../../etc/passwd"}, 400, "training_file", "file_not_found"),
        ({"training_file": "file-pairs"}, 400, "training_file", "invalid_file_format"),
        ({"method": {"type": "dpo"}}, 400, "training_file", "invalid_file_format"),
        ({"validation_file": "file-pairs"}, 400, "validation_file", "invalid_file_format"),
        ({"suffix": "x" * 65}, 400, "suffix", "invalid_value"),
        ({"suffix": "a:b"}, 400, "suffix", "invalid_value"),
        ({"seed": -1}, 400, "seed", "invalid_value"),
        ({"temperature": 1}, 400, "temperature", "unknown_parameter"),
        ({"hyperparameters": {"n_epochs": 0}}, 400, "hyperparameters.n_epochs", "invalid_value"),
        ({"hyperparameters": {"learning_rate": 1}}, 400, "hyperparameters.learning_rate", "unknown_parameter"),
        ({"metadata": {"a": "x" * 513}}, 400, "metadata.a", "invalid_value"),
        ({"method": {"type": "reinforcement", "reinforcement": {"grader": {}}}}, 400, "method.type",
         "unsupported_value"),
        ({"method": {"type": "supervised", "reinforcement": {"grader": {}}}}, 400, "method", "invalid_value"),
        ({"integrations": [{"type": "mlflow", "wandb": {"project": "a"}}]}, 400, "integrations.0.type",
         "invalid_value"),
    ],
)  # fmt: skip
def test_a_job_that_cannot_be_is_refused_in_the_apis_form(
    served: Served, more: dict[str, Any], status: int, param: str, code: str
) -> None:
    body = {"model": "tiny", "training_file": "file-chat", **more}
    found, tree, _ = ask(served[1], "POST", "/v1/fine_tuning/jobs", body)
    assert (found, tree["error"]["param"], tree["error"]["code"]) == (status, param, code)
    assert set(tree["error"]) == {"message", "type", "param", "code"}
    assert served[1].fine_tuning.jobs.list().data == []


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("POST", "/v1/fine_tuning/jobs", b"{", 400),
        ("POST", "/v1/fine_tuning/jobs", b"[" * 10_000, 400),
        ("POST", "/v1/fine_tuning/jobs", b'{"seed": 1' + b"0" * 5_000 + b"}", 400),
        ("POST", "/v1/fine_tuning/jobs", b"x" * 20_001, 413),
        ("GET", "/v1/fine_tuning/jobs?limit=0", None, 400),
        ("GET", "/v1/fine_tuning/jobs?after=ftjob-none", None, 404),
        ("GET", "/v1/fine_tuning/jobs/ftjob-none/events", None, 404),
        ("POST", "/v1/fine_tuning/jobs/ftjob-none/cancel", None, 404),
        ("GET", "/v1/files/..%2f..%2fserver.sqlite/content", None, 404),
        ("GET", "/v1/files/%00/content", None, 404),
        ("GET", "/v1/files?order=up", None, 400),
        ("DELETE", "/v1/models/tiny", None, 403),
        ("DELETE", "/v1/files/file-none", None, 404),
        ("PUT", "/v1/files", None, 405),
        ("GET", "/v1/nothing", None, 404),
        ("GET", "/docs", None, 404),
    ],
)
def test_every_mistake_has_the_apis_form(
    served: Served, method: str, path: str, body: bytes | None, status: int
) -> None:
    found, tree, _ = ask(served[1], method, path, body)
    assert found == status
    assert tree["error"]["message"]
    assert tree["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("place", ["value", "key", "deep", "unknown"])
def test_half_a_surrogate_pair_is_refused_wherever_it_stands(served: Served, place: str) -> None:
    """It can be read, but written into no answer and no database."""
    said: dict[str, Any] = {"role": "user", "content": "hi"}
    more: dict[str, Any] = {
        "value": {"metadata": {"a": "\ud800"}},
        "key": {"messages": [{**said, "\udfff": 1}], "store": True},
        "deep": {"messages": [{**said, "more": [{"a": ["x", "\ud800"]}]}], "store": True},
        "unknown": {"\ud800": 1},
    }[place]
    method = {"type": "reinforcement", "reinforcement": {"g": "\ud800"}}
    for path, body in (
        ("/v1/fine_tuning/jobs", {"model": "tiny", "training_file": "file-chat", "method": method}),
        ("/v1/fine_tuning/jobs", {"model": "tiny", "training_file": "file-chat", **more}),
        ("/v1/chat/completions", {"model": "tiny", "messages": [said], **more}),
        ("/phinetune/votes", more),
    ):
        status, tree, _ = ask(served[1], "POST", path, body)
        assert (status, tree["error"]["code"]) == (400, "invalid_value"), path
        assert "surrogate" in tree["error"]["message"]
    whole = {"model": "tiny", "training_file": "file-none", "metadata": {"a": "\U0001f600"}}  # two escapes, one sign
    assert ask(served[1], "POST", "/v1/fine_tuning/jobs", whole)[1]["error"]["code"] == "file_not_found"


def test_a_body_without_a_length_is_counted_as_it_comes(served: Served) -> None:
    part = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
    form = {"Content-Type": "multipart/form-data; boundary=b"}
    for path, begins, headers in (("/v1/fine_tuning/jobs", b'{"model": "', {}), ("/v1/files", part, form)):
        chunks = iter([begins, *[b"x" * 60_000] * 4])
        found, tree, _ = ask(served[1], "POST", path, chunks, headers)
        assert (found, tree["error"]["code"]) == (413, "too_large"), path


def test_an_upload_is_refused_by_purpose_and_by_size(served: Served) -> None:
    files = served[1].files
    with pytest.raises(openai.BadRequestError, match="'batch'"):
        files.create(file=("a.jsonl", b"{}"), purpose="batch")
    with pytest.raises(openai.BadRequestError, match="is not one of"):
        files.create(file=("a.jsonl", b"{}"), purpose="mine")  # type: ignore[arg-type]
    with pytest.raises(openai.APIStatusError) as refused:
        files.create(file=("a.jsonl", b"x" * 5_001), purpose="fine-tune")
    assert refused.value.status_code == 413
    assert sorted(place.name for place in (served[0].folder / "files").iterdir()) == [
        "file-chat.jsonl",
        "file-pairs.jsonl",
    ]


def test_lists_have_cursors_and_jobs_are_found_by_metadata(tmp_path: Path) -> None:
    with threaded(tmp_path) as (state, client):
        names = [keep_file(state, f"file-{i}") for i in range(5)]
        assert [one.id for one in client.files.list(limit=2)] == names[::-1]  # the client turns the pages
        assert [one.id for one in client.files.list(limit=2, order="asc", after="file-1")] == names[2:]
        assert client.files.list(purpose="fine-tune-results").data == []
        assert client.files.retrieve(names[3]).filename == "file-3.jsonl"
        assert client.models.retrieve("tiny").owned_by == "phinetune"
        jobs = client.fine_tuning.jobs
        ids = [
            jobs.create(model="tiny", training_file="file-0", metadata={"who": who}).id for who in ("ann", "bo", "ann")
        ]
        assert [one.id for one in jobs.list(limit=1)] == ids[::-1]
        assert [one.id for one in jobs.list(metadata={"who": "ann"})] == [ids[2], ids[0]]
        assert jobs.list(limit=1, metadata={"who": "ann"}).has_more
        assert ask(client, "GET", "/v1/fine_tuning/jobs?metadata=null")[1]["data"] == []
        job = jobs.retrieve(ids[0])
        assert job.hyperparameters.model_dump() == dict.fromkeys(
            ("batch_size", "learning_rate_multiplier", "n_epochs"), "auto"
        )
        assert [one.message for one in jobs.list_events(job.id)] == [
            "Validating training file: file-0",
            f"Created fine-tuning job: {job.id}",
        ]
        with pytest.raises(openai.ConflictError):
            client.files.delete("file-0")
        assert jobs.pause(job.id).status == "paused"
        assert jobs.resume(job.id).status == "validating_files"
        for one in ids:
            assert jobs.cancel(one).status == "cancelled"
        with pytest.raises(openai.BadRequestError, match="has already ended"):
            jobs.cancel(job.id)
        assert client.files.delete("file-0").deleted
        assert not (state.folder / "files" / "file-0.jsonl").exists()


@pytest.mark.parametrize(
    ("headers", "status", "code"),
    [
        ({}, 200, None),
        ({"Authorization": ""}, 401, None),
        ({"Authorization": "Bearer sk-wrong"}, 401, "invalid_api_key"),
        ({"Authorization": "Bearer sk-wr\xf6ng"}, 401, "invalid_api_key"),
        ({"Host": "example.com"}, 403, "host_not_allowed"),
        ({"Host": "127.0.0.1.example.com:80"}, 403, "host_not_allowed"),
        ({"Host": "192.168.1.2"}, 403, "host_not_allowed"),
        ({"Host": "box.lan:8000"}, 200, None),
        ({"Origin": "https://example.com"}, 403, "origin_not_allowed"),
        ({"Origin": "null"}, 403, "origin_not_allowed"),
        ({"Origin": "http://["}, 403, "origin_not_allowed"),
        ({"Origin": "http://localhost:1", "Host": "localhost:1"}, 200, None),
    ],
)
def test_who_may_call(tmp_path: Path, headers: dict[str, str], status: int, code: str | None) -> None:
    with threaded(tmp_path, hosts=("box.lan",)) as (_, client):
        found, tree, sent = ask(client, "GET", "/v1/models", headers=headers)
        assert (found, tree.get("error", {}).get("code")) == (status, code)
        assert sent["x-content-type-options"] == "nosniff"
        assert "access-control-allow-origin" not in sent


def test_a_session_of_the_page_needs_its_token_to_change_anything(served: Served) -> None:
    client = served[1]
    alone = {"Authorization": ""}
    assert ask(client, "GET", "/healthz", headers=alone)[0] == 200
    assert ask(client, "GET", "/metrics", headers=alone)[0] == 401
    told = ask(client, "GET", "/metrics")[1]["text"]
    assert 'phinetune_requests_total{operation="healthz",status="200"} 1' in told.splitlines()
    assert ask(client, "POST", "/session", {"key": "wrong"}, alone)[0] == 401
    _, tree, headers = ask(client, "POST", "/session", {"key": KEY}, alone)
    cookie, *rest = headers["set-cookie"].split("; ")
    assert {"HttpOnly", "SameSite=Strict"} <= set(rest)
    session = {**alone, "Cookie": cookie}
    assert ask(client, "GET", "/v1/models", headers=session)[0] == 200
    wish = ("POST", "/v1/fine_tuning/jobs/ftjob-none/cancel", None)
    assert ask(client, *wish, session)[0] == 403
    assert ask(client, *wish, {**session, "X-CSRF-Token": tree["csrf_token"]})[0] == 404
    forged = {**session, "Cookie": f"{cookie[:-1]}{'0' if cookie[-1] != '0' else '1'}"}
    assert ask(client, "GET", "/v1/models", headers=forged)[0] == 401


def test_too_many_requests_at_once_are_told_to_wait(tmp_path: Path) -> None:
    with threaded(tmp_path, limits=Limits(requests=1)) as (state, client):
        held, free = threading.Event(), threading.Event()
        names = state.models.names

        def slow() -> Any:
            held.set()
            assert free.wait(30)
            return names()

        state.models.names = slow  # type: ignore[method-assign]
        thread = threading.Thread(target=client.models.list)
        thread.start()
        assert held.wait(30)
        status, tree, headers = ask(client, "GET", "/v1/files")
        free.set()
        thread.join()
        assert (status, tree["error"]["code"], headers["retry-after"]) == (429, "rate_limit_exceeded", "1")
        assert ask(client, "GET", "/v1/files")[0] == 200


def test_every_operation_is_described_and_none_is_open_by_mistake(served: Served) -> None:
    tree = ask(served[1], "GET", "/openapi.json")[1]
    paths = {(path, method) for path, found in tree["paths"].items() for method in found}
    assert ("/v1/fine_tuning/jobs/{fine_tuning_job_id}/pause", "post") in paths
    closed = [(p, m) for p, m in sorted(paths) if p not in ("/healthz", "/session")]
    assert len(closed) >= 17
    for path, method in closed:
        assert (
            ask(served[1], method.upper(), path.replace("{", "").replace("}", ""), b"{}", {"Authorization": ""})[0]
            == 401
        )
