"""Absurd values in an adapter_config.json are refused by key, before PEFT sees them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig

from phinetune.checkpoints.adapter_values import MOST_LAYERS, RULES, wrong_values

ABSURD: tuple[tuple[str, Any], ...] = (
    *(("r", value) for value in (0, -1, "8", 8.0, None, True, [8], 2**31, 10**30)),
    *(("lora_alpha", value) for value in ("16", None, True, float("nan"), float("inf"), 1e300, 10**400, [1])),
    *(("lora_dropout", value) for value in (-0.1, 1.5, "0", float("nan"), None)),
    *(("rank_pattern", value) for value in ([], "x", {"a": 0}, {"a": "8"}, {"a": None}, {"a": 2**40}, {"a": True})),
    *(("alpha_pattern", value) for value in ([], {"a": "1"}, {"a": float("nan")}, {"a": {}})),
    *(
        (key, value)
        for key in ("target_modules", "exclude_modules", "layers_pattern")
        for value in (5, {}, [1], [["a"]])
    ),
    *((key, value) for key in ("modules_to_save", "target_parameters") for value in ("a", 5, {}, [None])),
    *(("layers_to_transform", value) for value in ("all", -1, [0.5], [None], True, {"a": 1}, 2**31)),
    *(("layer_replication", value) for value in (5, [5], [[0]], [[0, 1, 2]], [["0", "1"]], [[1, 1]], [[2, 1]], {})),
    *(("layer_replication", value) for value in ([[0, 10**9]], [[0, 2]] * MOST_LAYERS, [[-1, 2]], [[0, float("nan")]])),
    *(("trainable_token_indices", value) for value in ("a", [-1], ["1"], {"a": 5}, {"a": [1.5]}, 7)),
    *(("alora_invocation_tokens", value) for value in ("a", [-1], {"a": [1]})),
    *(("bias", value) for value in (None, True, "some", 1, ["all"])),
    *(("init_lora_weights", value) for value in (1, [], {})),
    *((key, 5) for key in ("base_model_name_or_path", "revision", "task_type")),
    *((key, value) for key in ("fan_in_fan_out", "use_rslora", "use_dora", "lora_bias") for value in (1, "yes", [])),
    *(("megatron_config", value) for value in ({"a": 1}, "x", 1)),
)


@pytest.mark.parametrize(("key", "value"), ABSURD)
def test_an_absurd_value_is_named(key: str, value: Any) -> None:
    (problem,) = wrong_values({"r": 8, key: value})
    assert problem.startswith(f"`{key}` should be ")
    assert len(problem) < 300


def test_every_rule_is_tried() -> None:
    assert {key for key, _ in ABSURD} == RULES.keys()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"target_modules": "all-linear", "modules_to_save": ["lm_head"], "use_rslora": True, "bias": "all"},
        {"target_modules": ["a"], "rank_pattern": {"a": 4}, "alpha_pattern": {"a": 0.5}, "init_lora_weights": "pissa"},
        {"layers_to_transform": [0, 1], "layers_pattern": "layers", "target_modules": ["a"]},
        {"layers_to_transform": 3, "layers_pattern": ["layers"], "target_modules": ["a"], "lora_alpha": 0.25},
        {"layer_replication": [[0, 4], [2, 5]], "trainable_token_indices": {"embed_tokens": [0, 5]}},
        {"trainable_token_indices": [1], "target_parameters": ["a"], "exclude_modules": "x"},
        {"alora_invocation_tokens": [1, 2], "task_type": "CAUSAL_LM"},
    ],
)
def test_what_peft_writes_is_taken(tmp_path: Path, options: dict[str, Any]) -> None:
    LoraConfig(**options).save_pretrained(str(tmp_path))
    assert wrong_values(json.loads((tmp_path / "adapter_config.json").read_text())) == []
