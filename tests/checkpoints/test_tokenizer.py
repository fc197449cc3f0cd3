"""A tokenizer without its model: the same as with it, and no weights needed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from helpers import SHARED, TINY, tiny_config
from phinetune.checkpoints.load import load_base
from phinetune.checkpoints.random_shapes import byte_tokenizer
from phinetune.checkpoints.tokenizer import open_tokenizer
from phinetune.config.model import ModelSection
from phinetune.errors import ModelError
from phinetune.training.prepare import prepare_run, settle

TEXT = "<|user|>\nGrüße, 日本<|end|>\n"


def ids(section: ModelSection) -> list[int]:
    return list(open_tokenizer(section)(TEXT)["input_ids"])


def test_a_random_models_tokenizer_is_its_own() -> None:
    section = ModelSection(path=TINY)
    assert ids(section) == load_base(section).tokenizer(TEXT)["input_ids"]


def test_a_folder_needs_no_weights(tmp_path: Path) -> None:
    if not (SHARED / "phi3-tokenizer").is_dir():
        pytest.skip("the real Phi-3 tokenizer is not here")
    folder = tmp_path / "model"
    shutil.copytree(SHARED / "phi3-tokenizer", folder)
    assert ids(ModelSection(path=str(folder)))[0] == 32010
    assert ids(ModelSection(path=TINY, tokenizer=str(folder))) == ids(ModelSection(path=str(folder)))
    shutil.copy(SHARED / "hub-configs" / "phi-3-mini-4k-instruct.json", folder / "config.json")
    assert ids(ModelSection(path=str(folder)))[0] == 32010


@pytest.mark.parametrize("named", ["LlamaTokenizer", "LlamaTokenizerFast", "PreTrainedTokenizerFast"])
@pytest.mark.parametrize("as_model", [True, False])
def test_whatever_class_its_settings_name_tokenizer_json_decides(tmp_path: Path, named: str, as_model: bool) -> None:
    if not (SHARED / "phi3-tokenizer").is_dir():
        pytest.skip("the real Phi-3 tokenizer is not here")
    folder = tmp_path / "model"
    shutil.copytree(SHARED / "phi3-tokenizer", folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "tokenizer_class": named}))
    section = ModelSection(path=str(folder)) if as_model else ModelSection(path=TINY, tokenizer=str(folder))
    assert open_tokenizer(section)("<|user|>\nHello", add_special_tokens=False)["input_ids"] == [32010, 15043]


@pytest.mark.starter
def test_the_starters_is_the_models(starter_folder: Path) -> None:
    assert ids(ModelSection(path="starter")) == ids(ModelSection(path=str(starter_folder)))


@pytest.mark.parametrize("path", ["no/such/folder/here", "nobody/nothing", "nowhere"])
def test_what_is_not_there_is_a_sentence(path: str) -> None:
    with pytest.raises(ModelError, match=r"no such folder|could not be fetched"):
        open_tokenizer(ModelSection(path=path))


def test_a_tokenizer_with_more_ids_than_the_model_is_refused(tmp_path: Path, chats: Path) -> None:
    larger = byte_tokenizer(300)
    larger.add_tokens([f"<more {i}>" for i in range(60)])
    larger.save_pretrained(tmp_path / "larger")
    section = ModelSection(path=TINY, tokenizer=str(tmp_path / "larger"))
    words = r"larger: its tokenizer has ids up to \d+ .*, and the model has embeddings for 300 ids"
    with pytest.raises(ModelError, match=words):
        load_base(section)
    config = tiny_config(chats, tmp_path / "run")
    config.model = section
    with pytest.raises(ModelError, match=words):
        prepare_run(settle(config))


def test_a_smaller_tokenizer_is_taken(tmp_path: Path) -> None:
    byte_tokenizer(290).save_pretrained(tmp_path / "smaller")
    assert load_base(ModelSection(path=TINY, tokenizer=str(tmp_path / "smaller"))).tokenizer
