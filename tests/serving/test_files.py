"""What becomes of an upload that the server can't look at."""

from __future__ import annotations

import json
from pathlib import Path

import openai
import pytest

from helpers import chat
from phinetune.config.model import ModelSection
from serving.serving_helpers import threaded

ROW = json.dumps(chat("Hi", "Hello!")).encode()


def test_a_base_that_is_not_there_is_no_fault_of_a_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    gone = {"mini": ModelSection(path=str(tmp_path / "mini"))}
    with threaded(tmp_path / "server", models=gone) as (state, client):
        with pytest.raises(openai.InternalServerError) as refused:
            client.files.create(file=("rows.jsonl", ROW), purpose="fine-tune")
        assert (refused.value.status_code, refused.value.code) == (503, "cant_look")
        assert "mini" in str(refused.value)
        assert "mini" in caplog.text
        assert client.files.list().data == []
        assert list((state.folder / "files").iterdir()) == []
        with pytest.raises(openai.BadRequestError) as refused_too:
            client.files.create(file=("rows.jsonl", b"no JSON"), purpose="fine-tune")
        assert refused_too.value.code == "invalid_file_format"
