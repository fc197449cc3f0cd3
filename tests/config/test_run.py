"""The configuration: what is accepted, what is refused and in which words."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from phinetune.config.run import describe_config, dump_config, load_config, make_config
from phinetune.errors import ConfigError


def problems_of(tree: dict, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        make_config(tree, overrides)
    return caught.value.problems


def test_defaults_are_the_starter_on_the_best_precision() -> None:
    config = make_config({})
    assert (config.model.path, config.model.dtype, config.data.loss_on) == ("starter", "auto", "assistant")


def test_a_section_can_be_its_one_main_value() -> None:
    config = make_config({"model": "some/folder", "data": "chats.jsonl"})
    assert (config.model.path, config.data.train) == ("some/folder", "chats.jsonl")


def test_unknown_keys_are_refused_with_the_nearest_one_all_at_once() -> None:
    problems = problems_of({"modl": {}, "data": {"trian": "x"}, "evaluation": {"nothing_like_it": 1}})
    assert problems == [
        "configuration: data: there is no key `trian`; did you mean `train`?",
        "configuration: evaluation: there is no key `nothing_like_it`",
        "configuration: there is no key `modl`; did you mean `model`?",
    ]


def test_bad_values_name_their_key_and_what_was_given() -> None:
    problems = problems_of({"data": {"loss_on": "everything", "eval": 1.5}, "evaluation": {"batch_size": 0}})
    assert any("data.loss_on" in p and "'everything'" in p for p in problems)
    assert any("between 0 and 1" in p for p in problems)
    assert any("evaluation.batch_size" in p and "0" in p for p in problems)


@pytest.mark.parametrize(
    ("given", "bf16", "dtype"),
    [(None, True, "bfloat16"), ("auto", True, "bfloat16"), ("float32", True, "float32"), (None, False, "auto")],
)
def test_bf16_without_a_dtype_asks_for_bfloat16_weights(given: str | None, bf16: bool, dtype: str) -> None:
    model = {"path": "starter", **({"dtype": given} if given else {})}
    assert make_config({"model": model, "training_config": {"bf16": bf16}}).model.dtype == dtype


@pytest.mark.parametrize("given", ["bfloat16", "bf16", torch.bfloat16, "torch.bfloat16"])
def test_torch_dtype_is_the_older_name_of_dtype(given: object) -> None:
    assert make_config({"model": {"torch_dtype": given}}).model.dtype == "bfloat16"


def test_the_keywords_of_the_model_cards_sample_are_taken(caplog: pytest.LogCaptureFixture) -> None:
    sample = {"use_cache": False, "trust_remote_code": True, "torch_dtype": torch.bfloat16, "device_map": None}
    model = make_config({"model": {"path": "x", "attn_implementation": "flash_attention_2", **sample}}).model
    assert (model.use_cache, model.dtype, model.attn_implementation) == (False, "bfloat16", "flash_attention_2")
    assert "trust_remote_code has no effect" in caplog.text


def test_overrides_reach_into_sections_and_dictionaries() -> None:
    config = make_config(
        {"model": "starter", "training_config": {"max_steps": 9}},
        ["training_config.max_steps=5", "model.dtype=float32", "data.eval=0.5", "peft_config.target_modules=[a, b]"],
    )
    assert config.training_config == {"max_steps": 5}
    assert (config.model.path, config.model.dtype) == ("starter", "float32")
    assert config.data.eval == 0.5
    assert config.peft_config == {"target_modules": ["a", "b"]}


@pytest.mark.parametrize("override", ["data.limit", "=3", "data..limit=3", "training_config.max_steps.x=1"])
def test_a_malformed_override_is_named(override: str) -> None:
    tree = {"training_config": {"max_steps": 9}}
    assert override in problems_of(tree, override)[0]


def test_overrides_leave_the_given_dictionaries_alone() -> None:
    tree = {"training_config": {"max_steps": 9}}
    make_config(tree, ["training_config.max_steps=5"])
    assert tree == {"training_config": {"max_steps": 9}}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model: {path: a\ndata: b\n", ":2: broken YAML"),
        ("- a\n- b\n", "expected sections"),
        ("model: {pth: a}", "did you mean `path`?"),
    ],
    ids=["syntax", "list", "typo"],
)
def test_a_broken_file_is_named_with_its_line(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(file)
    assert str(file) in str(caught.value)
    assert words in str(caught.value)


def test_a_missing_file_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        load_config(tmp_path / "none.yaml")


def test_what_is_dumped_loads_as_the_same(tmp_path: Path) -> None:
    config = make_config({"data": {"train": "ä.jsonl", "eval": 0.1}, "peft_config": {"r": 8}})
    file = tmp_path / "config.yaml"
    file.write_text(dump_config(config), encoding="utf-8")
    assert load_config(file) == config


def test_every_knob_has_help() -> None:
    knobs = describe_config()
    assert {"model.path", "data.train", "evaluation.batch_size", "peft_config"} <= {key for key, _, _ in knobs}
    assert all(help_text for _, _, help_text in knobs)


def test_training_files_may_have_weights() -> None:
    config = make_config({"data": {"train": ["a.jsonl", {"path": "b.jsonl", "weight": 2}]}})
    assert config.model_validate(config.model_dump(mode="json")) == config
    assert config.model_dump(mode="json")["data"]["train"] == ["a.jsonl", {"path": "b.jsonl", "weight": 2.0}]
    assert make_config({"data": ["a.jsonl", {"path": "b.jsonl"}]}).data.train[1].weight == 1  # type: ignore[index,union-attr]


def test_a_mistake_in_a_weighted_file_is_named() -> None:
    train = ["a.jsonl", {"pth": "b.jsonl"}, {"path": "c.jsonl", "weight": 0}]
    (problem,) = problems_of({"data": {"train": train[:2]}})
    assert problem.startswith("configuration: data.train: entry 2: ")
    assert "there is no key `pth`; did you mean `path`?" in problem
    (problem,) = problems_of({"data": {"train": train[2:]}})
    assert "entry 1: weight: Input should be greater than 0" in problem


@pytest.mark.parametrize(
    ("tree", "said"),
    [
        (
            {"engine": {"activation_memory": "low"}},
            "engine.activation_memory: Input should be 'auto', 'none' or 'all', or a valid integer (given: 'low')",
        ),
        (
            {"evaluation": {"batch_size": 0}},
            "evaluation.batch_size: Input should be 'auto', or greater than or equal to 1 (given: 0)",
        ),
        (
            {"evaluation": {"fixed_prompts": "Hi"}},
            "evaluation.fixed_prompts: Input should be a valid integer, or a valid list (given: 'Hi')",
        ),
        (
            {"evaluation": {"fixed_prompts": ["Hi", 7]}},
            "evaluation.fixed_prompts.1: Input should be a valid string (given: 7)",
        ),
        ({"peft_config": {1: 2}}, "peft_config.1: Input should be a valid string (given: 1)"),
        ({"evaluation": {"max_prompts": 1.5}}, "evaluation.max_prompts: Input should be a valid integer (given: 1.5)"),
    ],
)
def test_a_knob_that_takes_several_kinds_of_values_has_one_sentence(tree: dict, said: str) -> None:
    assert problems_of(tree) == [f"configuration: {said}"]
