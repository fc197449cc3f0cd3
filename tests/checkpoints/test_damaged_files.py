"""Every file that opening a model or a run reads, damaged in many ways: it opens, or a sentence says what is wrong."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from helpers import TINY
from phinetune.checkpoints.load import load_base, read_config, read_generation
from phinetune.checkpoints.opened import open_model
from phinetune.checkpoints.small_files import read_json
from phinetune.config.model import ModelSection
from phinetune.config.run import dump_config, make_config
from phinetune.errors import ModelError, PhinetuneError
from phinetune.run_folder import CONFIG, MARK

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n"
PAGE = b"<!DOCTYPE html><html><body>404</body></html>"
BASE_FILES = (
    *("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"),
    *("chat_template.jinja", "special_tokens_map.json", "added_tokens.json"),
)
RUN_FILES = ("adapter_config.json", "adapter_model.safetensors", "base.json", CONFIG)
# Damage that leaves a file which means something else, but can be read.
READABLE = {
    *(("generation_config.json", "{}"), ("tokenizer_config.json", "{}"), ("special_tokens_map.json", "{}")),
    ("added_tokens.json", "{}"),
}


def damages(data: bytes) -> dict[str, bytes | None]:
    """A file's content after each kind of damage; None is a folder in its place."""
    rng = random.Random(0)
    cuts = {f"cut at {share:.0%}": data[: int(len(data) * share)] for share in (0.0, 0.1, 0.5, 0.99)}
    noise = {f"noise {i}": bytes(rng.randrange(256) for _ in range(200)) for i in range(3)}
    trees: dict[str, bytes | None] = {text: text.encode() for text in ("[]", "5", "null", '"x"', "{}", "[[1]]")}
    return {**cuts, **noise, **trees, "deep": b"[" * 100_000, "pointer": LFS, "page": PAGE, "folder": None}


def damaged_copies(source: Path, names: tuple[str, ...], target: Path) -> Iterator[tuple[str, str]]:
    """Copy `source` to `target` once for each file and damage; gives both."""
    for name in names:
        for label, data in damages((source / name).read_bytes()).items():
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree(source, target)
            (target / name).unlink()
            (target / name).mkdir() if data is None else (target / name).write_bytes(data)
            yield name, label


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base with every file that a tokenizer may have, and a run's folder as far as opening reads it."""
    folder = tmp_path_factory.mktemp("whole")
    base, run = folder / "base", folder / "run"
    made = load_base(ModelSection(path=TINY), fast=False)
    made.model.save_pretrained(base)
    made.tokenizer.save_pretrained(base)
    (base / "special_tokens_map.json").write_text(json.dumps({"bos_token": "<s>"}))
    (base / "added_tokens.json").write_text(json.dumps({"<|end|>": 262}))
    loaded = load_base(ModelSection(path=str(base)))
    lora = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    get_peft_model(loaded.model, lora).save_pretrained(str(run))
    (run / "base.json").write_text(loaded.base.to_json())
    (run / CONFIG).write_text(MARK + dump_config(make_config({"model": str(base)})))
    return base, run


def outcome(opens: Callable[[], Any]) -> str:
    """What became of opening: the sentence, or nothing. Any other error is a failure of the test."""
    try:
        model = opens().model
    except PhinetuneError as error:
        return str(error)
    assert torch.isfinite(model(torch.tensor([[5, 6, 7]])).logits).all()
    return ""


@pytest.mark.parametrize("name", BASE_FILES)
def test_a_damaged_file_of_a_base(places: tuple[Path, Path], tmp_path: Path, name: str) -> None:
    for file, label in damaged_copies(places[0], (name,), tmp_path / "x"):
        said = outcome(lambda: load_base(ModelSection(path=str(tmp_path / "x"))))
        assert bool(said) is ((file, label) not in READABLE), (label, said)
        assert "\n" not in said or "don't fit" in said
        if file == "chat_template.jinja" and label.startswith(("noise", "folder")):
            assert "chat_template.jinja: not UTF-8 text" in said, (label, said)
        if label in ("pointer", "page") and file != "chat_template.jinja":
            assert file in said, (label, said)
            assert ("git lfs pull" if label == "pointer" else "web page") in said, said


@pytest.mark.parametrize("name", RUN_FILES)
def test_a_damaged_file_of_a_run(places: tuple[Path, Path], tmp_path: Path, name: str) -> None:
    for _, label in damaged_copies(places[1], (name,), tmp_path / "x"):
        said = outcome(lambda: open_model(tmp_path / "x"))
        assert said or (name == CONFIG and label.startswith("cut")), label  # YAML can be cut between two keys


def test_a_whole_base_and_a_whole_run_open(places: tuple[Path, Path]) -> None:
    assert outcome(lambda: load_base(ModelSection(path=str(places[0])))) == ""
    assert outcome(lambda: open_model(places[1])) == ""


VALUES: tuple[Any, ...] = (None, "x", -1, 0, 1.5, True, [], {}, ["a"], {"a": 1})


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "adapter_config.json", "base.json"])
def test_any_value_of_any_key(places: tuple[Path, Path], tmp_path: Path, name: str) -> None:
    is_run = (places[1] / name).is_file()
    source = places[1] if is_run else places[0]
    copy = tmp_path / "x"
    shutil.copytree(source, copy)
    tree = json.loads((copy / name).read_text())
    for key in tree:
        for value in random.Random(key).sample(VALUES, 1 if is_run else 4):
            (copy / name).write_text(json.dumps({**tree, key: value}))
            outcome(lambda: open_model(copy) if is_run else load_base(ModelSection(path=str(copy))))


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{% for m in messages %}", "can't be rendered .*Unexpected end of template"),
        ("{{ messages | shout }}", "can't be rendered .*No filter named 'shout'"),
        ("{{ raise_exception('no') }}", "can't be rendered .*: no$"),
        ("{{ messages[7].content }}", "can't be rendered .*has no element 7"),
        ("{{ 1 / 0 }}", "can't be rendered .*division by zero"),
        ("no message in it", "leaves out what the user says"),
        (
            "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}",
            "the assistant says",
        ),
    ],
)
def test_a_chat_template_with_a_fault_is_told_before_the_weights(
    places: tuple[Path, Path], tmp_path: Path, template: str, words: str
) -> None:
    shutil.copytree(places[0], tmp_path / "x")
    (tmp_path / "x" / "chat_template.jinja").write_text(template)
    with pytest.raises(ModelError, match=words):
        load_base(ModelSection(path=str(tmp_path / "x")))


@pytest.mark.parametrize("key", ["vocab_size", "num_hidden_layers", "max_position_embeddings", "sliding_window"])
def test_sizes_are_one_or_more(places: tuple[Path, Path], tmp_path: Path, key: str) -> None:
    tree = json.loads((places[0] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**tree, key: 0}))
    with pytest.raises(ModelError, match=rf"config\.json: .*{key}"):
        read_config(tmp_path)


@pytest.mark.parametrize("layers", [1001, 4_000_000_000, 10**30])
def test_billions_of_layers_are_not_built(places: tuple[Path, Path], tmp_path: Path, layers: int) -> None:
    tree = json.loads((places[0] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**tree, "num_hidden_layers": layers}))
    with pytest.raises(ModelError, match=rf"config\.json: num_hidden_layers: {layers:,}: must be 1000 or less"):
        read_config(tmp_path)


@pytest.mark.parametrize("ids", ["262", [None], 1.5, ["<|end|>"]])
def test_ids_of_the_generation_config_are_numbers(places: tuple[Path, Path], tmp_path: Path, ids: Any) -> None:
    """A damaged file is passed over by transformers, and with it the ids that end an answer."""
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    with pytest.raises(ModelError, match=r"generation_config\.json: "):
        read_generation(tmp_path, read_config(places[0]))


def test_a_run_without_its_configuration_is_not_opened_with_defaults(places: tuple[Path, Path], tmp_path: Path) -> None:
    shutil.copytree(places[1], tmp_path / "x")
    (tmp_path / "x" / CONFIG).write_bytes(LFS)
    with pytest.raises(ModelError, match=r"config\.yaml: damaged: .*git lfs pull"):
        open_model(tmp_path / "x")


def test_a_file_that_can_not_be_read_is_named(tmp_path: Path) -> None:
    for data, words in (
        (b"{", "broken JSON"),
        (b"\xff", "broken JSON"),
        (b"[1]", "expected a JSON object, found list"),
    ):
        (tmp_path / "a.json").write_bytes(data)
        with pytest.raises(ModelError, match=rf"a\.json: {words}"):
            read_json(tmp_path / "a.json")
    with pytest.raises(ModelError, match=r"no b\.json there"):
        read_json(tmp_path / "b.json")
