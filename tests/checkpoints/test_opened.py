"""A run is opened from any folder, with what was recorded."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers import tiny_config, train_only
from phinetune.api.held_out import held_out_chats
from phinetune.checkpoints import answer_weights
from phinetune.checkpoints.load import Loaded
from phinetune.checkpoints.opened import open_model, opened_config
from phinetune.errors import ConfigError, ModelError
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


@pytest.mark.parametrize(
    ("peft", "stays"),
    [
        ({}, True),
        ({"use_dora": True}, False),
        ({"init_lora_weights": "pissa"}, True),
        ({"init_lora_weights": "orthogonal"}, True),
    ],  # saved is an update that adds
    ids=["lora", "dora", "pissa", "orthogonal"],
)
def test_a_base_lies_in_half_under_an_adapter_that_only_adds_to_it(
    tiny: Loaded, folder: Path, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, peft: Any, stays: bool
) -> None:
    copy.deepcopy(tiny.model).bfloat16().save_pretrained(folder)
    monkeypatch.setattr(answer_weights.few_rows, "reads_half", lambda: True)
    config = tiny_config(chats, tmp_path / "run", max_steps=1)
    config.model.path, config.model.dtype = str(folder), "float32"
    config.peft_config |= peft
    train_only(config)
    for weights in ("auto", None):
        model = open_model(tmp_path / "run", weights=weights).model
        kinds = {parameter.dtype for parameter in model.parameters()}
        assert (torch.bfloat16 in kinds) == (stays and weights == "auto")
        assert torch.float32 in kinds
    if stays:
        model = open_model(tmp_path / "run", weights="q8_0").model
        assert {parameter.dtype for parameter in model.parameters()} == {torch.int8, torch.float32}
    else:
        with pytest.raises(ConfigError, match="does more than add to its base"):
            open_model(tmp_path / "run", weights="q8_0")
