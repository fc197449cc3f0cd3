"""YAML: too long, too deep, standing for too much, or with a key twice, it is refused in a sentence."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from phinetune.config.run import load_config, make_config
from phinetune.config.yaml_text import LONGEST, read_yaml
from phinetune.errors import ConfigError

LAUGHS = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 10))
MERGES = "a0: &a0 {k: x}\n" + "".join(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 10)}]}}\n" for i in range(1, 7))
BAD = {
    "aliases of aliases": (LAUGHS, "stand for more than 100,000 values"),
    "dictionaries of aliases": (LAUGHS.replace("[", "{k: [").replace("]", "]}"), "stand for more than"),
    "merge keys of merge keys": (MERGES, "stand for more than"),
    "a list in itself": ("data: &a [*a]", "stand for more than"),
    "a dictionary in itself": ("data: &a {b: *a}", "stand for more than"),
    "too deep": ("[" * 3_000, "too deep"),
    "too long": ("#" + "x" * LONGEST, "letters; at most 1,048,576 are read"),
    "a 13th month": ("data: 2020-13-45", "month must be in 1..12"),
    "a number that is none": ("data: !!int x", "can't be read"),
    "a date that is none": ("data: !!timestamp x", "can't be read"),
    "an object": ("data: !!python/object/apply:os.system [ls]", "could not determine a constructor"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_text_is_refused(tmp_path: Path, kind: str) -> None:
    text, words = BAD[kind]
    with pytest.raises(yaml.YAMLError, match=words):
        read_yaml(text, "c.yaml")
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"c\.yaml.*: broken YAML: .*" + words) as caught:
        load_config(tmp_path / "c.yaml")
    assert len(caught.value.problems) == 1


def test_aliases_in_measure_are_read() -> None:
    assert read_yaml("a: &a [1, 2]\nb: *a", "c.yaml") == {"a": [1, 2], "b": [1, 2]}


def test_an_override_that_is_no_yaml_is_text() -> None:
    assert make_config({}, ["model.path=2020-13-45"]).model.path == "2020-13-45"


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
