"""A run is opened from any folder, with what was recorded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from helpers import tiny_config, train_only
from phinetune.api.held_out import held_out_chats
from phinetune.checkpoints.opened import open_model, opened_config
from phinetune.errors import ModelError
from phinetune.exporting.merge.merged import open_merged


def test_a_run_on_a_relative_base_is_opened_from_another_folder(
    folder: Path, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "chats.jsonl").write_bytes(chats.read_bytes())
    monkeypatch.chdir(tmp_path)
    config = tiny_config(Path("chats.jsonl"), Path("run"), max_steps=1)
    config.model.path, config.model.tokenizer = "./model", "model"
    train_only(config)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    opened = open_model("../run")
    assert opened.has_adapter
    assert opened.loaded.base.path == json.loads(Path("../run/base.json").read_text())["path"] == str(folder)
    assert open_merged("../run").base.path == str(folder)
    found = held_out_chats(opened_config("../run"), Path("../run"))  # read from the data file again
    assert found is not None
    assert len(found.chats) == 3


def test_an_adapter_on_a_base_that_makes_no_model_is_refused_in_a_sentence(
    folder: Path, chats: Path, tmp_path: Path
) -> None:
    config = tiny_config(chats, tmp_path / "run", max_steps=1)
    config.model.path = str(folder)
    train_only(config)
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "hidden_act": "swish9"}))
    with pytest.raises(ModelError, match=r"no model can be made of it: .*swish9"):
        open_model(tmp_path / "run")
