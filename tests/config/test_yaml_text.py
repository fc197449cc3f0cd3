"""YAML: a key that stands twice is refused with its line; anchors and merge keys are not keys that stand twice."""

from __future__ import annotations

from pathlib import Path

import pytest

from phinetune.config.run import load_config, make_config
from phinetune.errors import ConfigError


def load(tmp_path: Path, text: str, *overrides: str) -> dict:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    return load_config(file, overrides).model_dump()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "training_config:\n  seed: 1\ntraining_config:\n  max_steps: 2\n",
            ["3: `training_config` is given twice, first in line 1"],
        ),
        ("peft_config: {r: 8, r: 2}\n", ["1: `r` is given twice, first in line 1"]),
        ("peft_config:\n  r: 8\n  'r': 8\n", ["3: `r` is given twice, first in line 2"]),
        (
            "data:\n  train:\n  - {path: a, weight: 1, path: b}\nmodel: a\nmodel: b\n",
            ["3: `path` is given twice, first in line 3", "5: `model` is given twice, first in line 4"],
        ),
    ],
)
def test_a_key_that_stands_twice_is_refused_with_file_and_line(tmp_path: Path, text: str, said: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text)
    assert caught.value.problems == [f"{tmp_path}/run.yaml:{one}; keep one of them" for one in said]


def test_anchors_and_merge_keys_stay(tmp_path: Path) -> None:
    text = "training_config: &a {seed: 1, max_steps: 3}\npeft_config:\n  <<: {r: 4, lora_alpha: 8}\n  r: 2\n  <<: {}\n"
    assert load(tmp_path, text)["peft_config"] == {"r": 2, "lora_alpha": 8}


def test_an_override_with_a_key_twice_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^--set peft_config=\{r: 8, r: 2\}: `r` is given twice; keep one of them$"):
        make_config({}, ["peft_config={r: 8, r: 2}"])
