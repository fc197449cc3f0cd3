"""Exports: what may be asked for, their process, what survives a server, and their download."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI
from rich.console import Console

from exporting.hub.hub_helpers import USER, point_at, serve_hub
from helpers import TINY, tiny_config
from phinetune.api.train import train_config
from phinetune.config.model import ModelSection
from phinetune.exporting.targets import TARGETS
from phinetune.liveness import this_process
from phinetune.serving.page import export_work
from phinetune.serving.page.exports import OFFERED, ExportKeeper, ExportPlaces, own_name
from phinetune.serving.page.tar_stream import tar_stream
from phinetune.serving.state import ServerState
from serving.page.page_helpers import TUNED, Visitor, offer_run
from serving.serving_helpers import ask, threaded, until

Served = tuple[ServerState, OpenAI]
PATH = "/phinetune/exports"


@pytest.fixture
def served(tmp_path: Path, tiny_run: Path) -> Iterator[Served]:
    """A server with a tuned model. Nobody keeps its exports; tests do."""
    with threaded(tmp_path / "server") as made:
        offer_run(made[0], tiny_run)
        yield made


def test_what_the_page_offers_is_there() -> None:
    assert {target: set(kinds) <= set(TARGETS[target].types) for target, kinds in OFFERED.items() if kinds} == (
        dict.fromkeys(TARGETS, True)
    )


def test_names_are_made_of_a_models_own() -> None:
    names = (TUNED, f"{TUNED}:ckpt-step-4", "ft:a/b:phinetune::abcdefgh", "ft:../..:phinetune:..:x", "odd")
    assert [own_name(name) for name in names] == [
        "my-shop-abcdef",
        "my-shop-abcdef-ckpt-step-4",
        "a-b-abcdef",
        "x",
        "odd",
    ]


@pytest.mark.parametrize(
    ("more", "status"),
    [
        ({"model": "ft:none"}, 404),
        ({"model": "tiny"}, 400),
        ({"target": "exe"}, 400),
        ({"type": "q1"}, 400),
        ({"target": "merge", "type": "f16"}, 400),
        ({"repo": "a/b"}, 400),
        ({"private": False}, 400),
        ({"target": "push"}, 400),
        ({"out": "/tmp/x"}, 400),
    ],
)
def test_what_does_not_go_together_is_refused(served: Served, more: dict[str, Any], status: int) -> None:
    found, tree, _ = ask(served[1], "POST", PATH, {"model": TUNED, "target": "gguf", **more})
    assert found == status
    assert tree["error"]["message"]
    assert served[0].store.rows("SELECT * FROM exports") == []


def test_a_push_needs_the_environments_token(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    asked = {"model": TUNED, "target": "push", "repo": "alice/mine"}
    status, tree, _ = ask(served[1], "POST", PATH, asked)
    assert (status, tree["error"]["code"]) == (400, "no_token")
    monkeypatch.setenv("HF_TOKEN", "hf_alice")
    assert ask(served[1], "POST", PATH, asked)[1]["repo"] == "alice/mine"
    (row,) = served[0].store.rows("SELECT * FROM exports")
    assert "hf_alice" not in json.dumps(row)


def test_an_export_is_written_by_a_process_of_its_own_and_downloaded(served: Served) -> None:
    state, client = served
    visitor = Visitor(client)
    first = visitor.do("POST", PATH, {"model": TUNED, "target": "gguf-lora"})[1]
    second = visitor.do("POST", PATH, {"model": TUNED, "target": "merge"})[1]
    assert (first["status"], first["type"], second["type"]) == ("queued", "f16", None)
    assert visitor.see(f"{PATH}/{first['id']}/content")[0] == 404
    keeper = ExportKeeper(state)
    keeper.start()
    try:
        ready = [until(lambda id=one["id"]: _ended(visitor, id)) for one in (first, second)]
    finally:
        keeper.close()
    assert [one["status"] for one in ready] == ["succeeded", "succeeded"], ready
    assert ready[0]["written"]["name"] == "my-shop-abcdef-f16.gguf"
    assert ready[0]["finished_at"] <= ready[1]["finished_at"]
    own, headers = visitor.download(f"{PATH}/{first['id']}/content")
    assert own[:4] == b"GGUF"
    assert 'filename="my-shop-abcdef-f16.gguf"' in headers["content-disposition"]
    packed, headers = visitor.download(f"{PATH}/{second['id']}/content")
    assert int(headers["content-length"]) == len(packed)
    with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        assert {"my-shop-abcdef/config.json", "my-shop-abcdef/model.safetensors"} <= set(archive.getnames())
    text = visitor.see("/phinetune/parts/exports")[1]["text"]
    assert f"{PATH}/{second['id']}/content" in text
    assert visitor.do("DELETE", f"{PATH}/{first['id']}")[0] == 200
    assert not ExportPlaces(state.folder, first["id"]).own.exists()
    assert visitor.see(f"{PATH}/{first['id']}")[0] == 404


def test_a_folder_for_ollama_is_written_and_downloaded(served: Served) -> None:
    assert "Modelfile" in _downloaded(served, TUNED, "ollama", "q8_0")


def test_a_folder_for_onnx_is_written_and_downloaded(served: Served, chats: Path) -> None:
    pytest.importorskip("onnxruntime_genai")  # there is none for Python 3.10
    wider = ModelSection(path=TINY.replace("heads: 4", "heads: 2"))  # it takes heads of 16 features
    run = served[0].folder / "runs" / "ftjob-bcdefg"
    config = tiny_config(chats, run, max_steps=1).model_copy(update={"model": wider})
    train_config(config, Console(file=io.StringIO()))
    name = TUNED.replace("abcdef", "bcdefg")
    served[0].models.add(name, wider.model_dump(), run, run.name)
    assert {"genai_config.json", "model.onnx"} <= _downloaded(served, name, "onnx", "f32")


def _downloaded(served: Served, model: str, target: str, kind: str) -> set[str]:
    """Names in the folder that an export has written."""
    visitor = Visitor(served[1])
    done = _kept(served[0], visitor, {"model": model, "target": target, "type": kind})
    assert done["status"] == "succeeded", done["error"]
    assert done["written"]["commands"]
    packed, _ = visitor.download(f"{PATH}/{done['id']}/content")
    with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        return {Path(name).name for name in archive.getnames()}


def test_a_model_is_pushed_by_the_environments_token(
    served: Served, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with serve_hub() as hub:
        point_at(hub, monkeypatch, tmp_path / "home")
        visitor = Visitor(served[1])
        asked = {"model": TUNED, "target": "push", "repo": f"{USER}/mine", "private": True}
        done = _kept(served[0], visitor, asked)
        assert done["status"] == "succeeded", done["error"]
        assert done["written"]["url"] == f"{hub.url}/{USER}/mine"
        assert hub.repos[f"{USER}/mine"].private
        assert {"adapter_model.safetensors", "README.md"} <= set(hub.repos[f"{USER}/mine"].files)
        refused = _kept(served[0], visitor, {**asked, "repo": "bob/mine"})
        assert refused["status"] == "failed"
        assert "bob/mine" in refused["error"]
    assert visitor.see(f"{PATH}/{done['id']}/content")[0] == 404  # it lies on the hub, and nowhere else


def _kept(state: ServerState, visitor: Visitor, asked: dict[str, Any]) -> dict[str, Any]:
    """An export that was asked for, after its process has ended."""
    status, made, *_ = visitor.do("POST", PATH, asked)
    assert status == 200, made
    keeper = ExportKeeper(state)
    keeper.start()
    try:
        return until(lambda: _ended(visitor, made["id"]))
    finally:
        keeper.close()


def _ended(visitor: Visitor, id: str) -> dict[str, Any] | None:
    told = visitor.see(f"{PATH}/{id}")[1]
    return told if told["status"] in ("succeeded", "failed") else None


def test_a_killed_server_loses_no_export(served: Served) -> None:
    """What was written while no server was there is found; what was not is said to have failed; the rest goes on."""
    state, client = served
    visitor = Visitor(client)
    done, dead, alive, waits = (
        visitor.do("POST", PATH, {"model": TUNED, "target": "merge"})[1]["id"] for _ in range(4)
    )
    gone = json.dumps({**this_process(), "pid": 2**22 - 1})
    for id, process in ((done, gone), (dead, None), (alive, json.dumps(this_process()))):
        state.store.update("exports", id, status="running", process=process)
        (ExportPlaces(state.folder, id).own / "out" / "my-shop").mkdir(parents=True)
    result = {"what": "a model", "size": 3, "commands": [], "notes": []}
    (ExportPlaces(state.folder, done).own / export_work.RESULT).write_text(json.dumps({"done": result}))
    (state.folder / "exports" / "export-nobodys").mkdir()
    keeper = ExportKeeper(state)
    keeper.adopt()
    keeper.round()
    told = {one["id"]: one for one in ask(client, "GET", PATH)[1]["data"]}
    assert [told[id]["status"] for id in (done, dead, alive, waits)] == ["succeeded", "failed", "running", "queued"]
    assert told[done]["written"]["name"] == "my-shop"
    assert "start it again" in told[dead]["error"]
    assert not (ExportPlaces(state.folder, dead).own / "out").exists()
    assert not (state.folder / "exports" / "export-nobodys").exists()


def test_an_order_that_fails_leaves_the_reason(tmp_path: Path) -> None:
    order = {"target": "gguf", "type": "f16", "run": str(tmp_path / "none"), "out": str(tmp_path / "x.gguf")}
    (problem,) = export_work.answer(order)["problems"]
    assert "none" in problem


@pytest.mark.parametrize("name", ["model", "ein langer Name " * 9])
def test_a_tar_stream_is_what_tarfile_reads(tmp_path: Path, name: str) -> None:
    folder = tmp_path / name
    (folder / "deeper").mkdir(parents=True)
    content = {"a": b"", "b": b"x" * 512, "deeper/ü": b"y" * 1025}
    for file, text in content.items():
        (folder / file).write_bytes(text)
    (folder / "link").symlink_to("/etc/passwd")
    size, pieces = tar_stream(folder)
    packed = b"".join(pieces)
    assert len(packed) == size
    with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        read = {one.name: (archive.extractfile(one) or io.BytesIO()).read() for one in archive}
    assert read == {f"{name}/{file}": text for file, text in content.items()}


def test_an_older_servers_tables_get_what_is_new(tmp_path: Path) -> None:
    with threaded(tmp_path) as (state, _):
        state.store.write("DROP TABLE votes")
        state.store.write("DROP TABLE exports")
        state.store.write("DROP TABLE answers")
        state.store.write("ALTER TABLE jobs DROP COLUMN crashes")
        state.store.write("PRAGMA user_version=1")
    with threaded(tmp_path) as (state, client):
        assert state.store.rows("SELECT crashes FROM jobs") == []
        assert ask(client, "GET", PATH)[1]["data"] == []
        assert ask(client, "GET", "/phinetune/votes")[1]["data"] == []
