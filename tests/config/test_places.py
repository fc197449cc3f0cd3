"""A configuration that is kept names its files so that they are found from any folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from phinetune.config.places import absolute_place, with_absolute_places
from phinetune.config.run import make_config


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a model, chats and a metric's file."""
    monkeypatch.chdir(tmp_path)
    for name in ("tiny", "words", "starter"):
        (tmp_path / name).mkdir()
    for name in ("a.jsonl", "b.jsonl", "metric.py"):
        (tmp_path / name).write_text("")
    return tmp_path


def test_every_place_becomes_absolute(here: Path) -> None:
    config = make_config(
        {
            "model": {"path": "./tiny", "tokenizer": "words"},
            "data": {"train": ["a.jsonl", {"path": "./b.jsonl", "weight": 2}], "eval": "b.jsonl"},
            "evaluation": {
                "metrics": ["rouge1", {"name": "m", "function": "metric.py:f"}, {"name": "n", "function": "math:sqrt"}]
            },
        }
    )
    made = with_absolute_places(config)
    assert (made.model.path, made.model.tokenizer) == (f"{here}/tiny", f"{here}/words")
    first, second = made.data.train  # type: ignore[misc]
    assert (first, second.path, second.weight) == (f"{here}/a.jsonl", f"{here}/b.jsonl", 2)
    assert made.data.eval == f"{here}/b.jsonl"
    assert [getattr(metric, "function", metric) for metric in made.evaluation.metrics] == [
        "rouge1",
        f"{here}/metric.py:f",
        "math:sqrt",
    ]
    assert config.model.path == "./tiny"


def test_lists_and_splits_of_held_out_chats_too(here: Path) -> None:
    for given, wanted in ((["a.jsonl"], [f"{here}/a.jsonl"]), (0.25, 0.25), (None, None)):
        config = make_config({"data": {"train": "a.jsonl", "eval": given}})
        assert with_absolute_places(config).data.eval == wanted
    split = make_config({"data": {"train": "tiny", "eval": {"path": "tiny", "split": "test"}}})
    assert with_absolute_places(split).data.eval.path == f"{here}/tiny"  # type: ignore[union-attr]
    split = make_config({"data": {"train": "tiny", "eval": {"split": "test"}}})
    assert with_absolute_places(split).data.eval.path is None  # type: ignore[union-attr]


@pytest.mark.parametrize("path", ["starter", "random:phi-3-mini", "microsoft/Phi-3-mini-4k-instruct", "gone"])
def test_what_is_no_folder_here_stays(here: Path, path: str) -> None:
    assert with_absolute_places(make_config({"model": path})).model.path == path


def test_a_path_is_followed_to_the_file_itself(here: Path) -> None:
    (here / "link").symlink_to(here / "tiny")
    assert absolute_place("link") == absolute_place("tiny/../tiny") == f"{here}/tiny"
    assert absolute_place("") == ""
