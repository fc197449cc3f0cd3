"""The pages: who sees them, what they hold, and that nothing that a file says acts on them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest
from openai import OpenAI

from phinetune.serving.ids import now
from phinetune.serving.page.rendering import OWN, POLICY
from phinetune.serving.page.routes import STATIC
from phinetune.serving.page.words import words_of
from phinetune.serving.sessions import new_session
from phinetune.serving.state import ServerState
from serving.page.page_helpers import Visitor, offer_run
from serving.serving_helpers import KEY, ask, keep_file, threaded

EVIL = "<img src=x onerror=alert(1)>\"'.jsonl"
PAGES = ("/page/data", "/page/train", "/page/compare", "/page/hand-on")
PARTS = ("files", "jobs", "votes", "exports", "jobs/ftjob-one")
Served = tuple[ServerState, OpenAI]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, tiny_run: Path) -> Iterator[Served]:
    """A server with a file of an evil name, a job that was cancelled, and a tuned model."""
    with threaded(tmp_path_factory.mktemp("served")) as made:
        state, client = made
        keep_file(state, "file-one")
        state.store.update("files", "file-one", filename=EVIL)
        job = client.fine_tuning.jobs.create(model="tiny", training_file="file-one", suffix="shop")
        client.fine_tuning.jobs.cancel(job.id)
        state.store.write("UPDATE jobs SET id = 'ftjob-one' WHERE id = ?", [job.id])
        state.store.write("UPDATE events SET job = 'ftjob-one'")
        offer_run(state, tiny_run)
        yield made


def test_without_a_session_there_is_a_place_to_sign_in_and_nothing_else(served: Served) -> None:
    state, client = served
    nobody = {"Authorization": ""}
    status, shown, headers = ask(client, "GET", "/", None, nobody)
    assert status == 200
    assert 'id="sign-in"' in shown["text"]
    assert headers["content-security-policy"] == POLICY
    forged = {**nobody, "Cookie": f"phinetune_session={new_session('another-key-than-ours')}"}
    for path in (*PAGES, "/page/files/file-one", "/page/jobs/ftjob-one", "/page/jobs/ftjob-one/report"):
        for sent in (nobody, forged):
            status, shown, headers = ask(client, "GET", path, None, sent)
            assert (status, headers["location"], shown["text"]) == (303, "/", ""), path
    for path in (*(f"/phinetune/parts/{part}" for part in PARTS), "/phinetune/votes", "/phinetune/exports"):
        for sent in (nobody, forged):
            assert ask(client, "GET", path, None, sent)[0] == 401, path
    assert state.key not in shown["text"]


def test_a_session_changes_nothing_without_its_token(served: Served) -> None:
    visitor = Visitor(served[1])
    visitor.token = "wrong"
    for path in ("/phinetune/exports", "/phinetune/votes", "/phinetune/plans", "/v1/fine_tuning/jobs"):
        assert visitor.do("POST", path, {})[0] == 403
    assert visitor.do("DELETE", "/phinetune/votes")[0] == 403


def test_signing_out_takes_the_cookie_back(served: Served) -> None:
    visitor = Visitor(served[1])
    assert visitor.see("/")[0] == 303
    status, _, headers = visitor.do("DELETE", "/session")
    assert (status, headers["set-cookie"]) == (
        204,
        "phinetune_session=; Path=/; HttpOnly; SameSite=Strict; Max-Age=0",
    )


def loaded_by(text: str) -> list[str]:
    """The addresses that HTML loads. No script or style stands in it, and nothing that a file's name made."""
    found: list[str] = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
            given = dict(attributes)
            assert tag not in ("img", "style", "iframe", "object", "base")
            assert not [name for name in given if name.startswith("on") or name == "style"], (tag, given)
            if tag == "script" and given.get("type") != "application/json":
                found.append(given["src"] or "")
            if tag == "link":
                found.append(given["href"] or "")

    Reader().feed(text)
    return found


@pytest.mark.parametrize("language", ["en", "zh"])
def test_every_page_comes_in_both_languages_and_loads_its_own_files_alone(served: Served, language: str) -> None:
    visitor = Visitor(served[1], language)
    paths = (*PAGES, "/page/files/file-one", "/page/jobs/ftjob-one", "/page/files/file-none")
    for path in paths:
        status, shown, headers = visitor.see(path)
        text = shown["text"]
        assert status == (404 if "none" in path else 200), path
        assert headers["content-security-policy"] == POLICY
        assert f'<html lang="{"en" if language == "en" else "zh-Hans"}">' in text
        assert set(loaded_by(text)) <= {"data:,", *(f"/page/static/{name}" for name in STATIC)}, path
    for part in PARTS:
        status, shown, _ = visitor.see(f"/phinetune/parts/{part}")
        assert status == 200
        assert loaded_by(shown["text"]) == []


def test_a_job_that_failed_is_told_in_the_pages_language_and_the_servers(served: Served) -> None:
    state, client = served
    error = json.dumps({"code": "insufficient_memory", "message": "it needs 9 <GB>", "param": None})
    state.store.update("jobs", "ftjob-one", error=error)
    try:
        for part in ("jobs", "jobs/ftjob-one"):
            english, chinese = (
                Visitor(client, language).see(f"/phinetune/parts/{part}")[1]["text"] for language in ("en", "zh")
            )
            assert '<p class="flag">it needs 9 &lt;GB&gt;</p>' in english
            assert f"{words_of('zh').table['problem.insufficient_memory']}\nit needs 9 &lt;GB&gt;</p>" in chinese
    finally:
        state.store.update("jobs", "ftjob-one", error=None)
    missing = Visitor(client, "zh").see("/page/jobs/ftjob-none")[1]["text"]
    assert words_of("zh").table["problem.fine_tune_not_found"] in missing


def test_its_files_are_public_and_no_others_are(served: Served) -> None:
    for name in STATIC:
        status, shown, headers = ask(served[1], "GET", f"/page/static/{name}", None, {"Authorization": ""})
        assert (status, bool(shown)) == (200, True)
        assert headers["content-type"].startswith(("text/javascript", "text/css"))
    for name in ("routes.py", "..%2froutes.py", "%2e%2e/words/en.yaml", "none.js"):
        assert ask(served[1], "GET", f"/page/static/{name}", None, {"Authorization": ""})[0] == 404
    assert {place.name for place in (OWN / "static").iterdir()} <= set(STATIC)


def test_words_for_scripts_can_not_end_their_element(served: Served) -> None:
    text = Visitor(served[1]).see("/page/data")[1]["text"]
    (table,) = re.findall(r'<script id="words" type="application/json">(.*?)</script>', text, re.DOTALL)
    assert json.loads(table)["nav.data"] == "Data"
    assert "<" not in table


def test_a_jobs_report_is_the_runs_own(served: Served, tiny_run: Path) -> None:
    state, client = served
    row = {"id": "ftjob-abcdefghijkl", "created_at": now(), "status": "succeeded", "model": "tiny"}
    more = {"request": '{"model": "tiny", "training_file": "file-one"}', "base": "{}", "base_id": "tiny", "suffix": ""}
    state.store.insert("jobs", {**row, **more, "seed": 1, "training_file": "file-one"})
    visitor = Visitor(client)
    status, shown, headers = visitor.see("/page/jobs/ftjob-abcdefghijkl/report")
    assert status == 200
    assert "content-security-policy" not in headers  # it has one of its own, for the scripts that stand in it
    assert "Content-Security-Policy" in shown["text"]
    assert 'data-state="finished"' in shown["text"]
    part = visitor.see("/phinetune/parts/jobs/ftjob-abcdefghijkl")[1]["text"]
    (charts,) = re.findall(r'<script class="charts" type="application/json">(.*?)</script>', part)
    assert [chart["key"] for chart in json.loads(charts)] == ["loss", "eval_loss"]
    assert visitor.see("/page/jobs/ftjob-one/report")[0] == 404
    assert KEY not in part
