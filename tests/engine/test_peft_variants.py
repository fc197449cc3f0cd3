"""The table of PEFT's variants: its keys are PEFT's own, and each part of phinetune reads its column."""

from __future__ import annotations

import dataclasses
import inspect
import re
import subprocess
import sys

import pytest
from peft import LoraConfig

from phinetune.engine.peft_variants import (
    STARTS,
    VARIANTS,
    changes_the_base,
    moves_the_base,
    not_converted,
    not_fast,
    not_merged,
    refused_starts,
    start_notes,
    why_not_begun_again,
    why_not_the_whole_update,
)


@pytest.mark.parametrize("key", VARIANTS)
def test_every_key_is_one_of_lora_config(key: str) -> None:
    assert key in {field.name for field in dataclasses.fields(LoraConfig)}


def test_lora_itself_is_taken_by_all() -> None:
    peft = vars(LoraConfig(r=4, lora_alpha=8, use_rslora=True, rank_pattern={"o_proj": 2}))
    assert not_fast(peft) == []
    assert not_merged(peft) == {}
    assert not_converted(peft) == []


def test_each_part_names_the_variants_that_it_refuses() -> None:
    peft = {"r": 4, "use_dora": True, "lora_bias": True, "target_parameters": ["qkv_proj.weight"]}
    assert not_fast(peft) == ["target_parameters"]
    assert not_merged(peft) == {
        "lora_bias": "Phi-3's layers have no bias that could take the adapter's",
        "target_parameters": "adapters on bare parameters are not merged",
    }
    assert not_converted(peft) == ["lora_bias", "target_parameters", "use_dora"]


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_16", "PiSSA", "corda", "olora", "loftq", "lora_ga"])
def test_an_initialisation_that_changes_the_base_is_recognised(start: str) -> None:
    assert changes_the_base(start)
    problem = why_not_the_whole_update(start)
    assert problem
    assert problem.startswith(f"`init_lora_weights` is {start!r}, which changed the base's weights")


@pytest.mark.parametrize("start", [True, False, None, "gaussian", "orthogonal", "eva", "mica"])
def test_an_initialisation_that_leaves_the_base_alone_is_no_problem(start: object) -> None:
    assert not changes_the_base(start)
    assert why_not_the_whole_update(start) is None


def test_every_start_that_peft_documents_is_in_the_table() -> None:
    documented = re.findall(
        r'"([a-z_]+)(?:_\[number of iters\])?"', inspect.getdoc(LoraConfig).split("init_lora_weights")[1][:200]
    )
    assert {name.removesuffix("_niter") for name in documented} <= {str(name) for name in STARTS}
    assert len(documented) == 9


@pytest.mark.parametrize("start", [True, False, "gaussian", "orthogonal", "mica", "pissa", "pissa_niter_4", "olora"])
def test_a_start_that_a_run_can_perform_is_no_problem(start: bool | str) -> None:
    assert refused_starts({"init_lora_weights": start}, "none") == []
    assert refused_starts({}, "nf4") == []


@pytest.mark.parametrize("config", [None, {}])
def test_empty_settings_of_a_start_are_none(config: object) -> None:
    assert refused_starts({"loftq_config": config, "eva_config": config}, "none") == []


def test_problems_with_a_start_and_with_settings_of_another_are_told_together() -> None:
    problems = refused_starts({"init_lora_weights": "pissa_iter_4", "corda_config": {"cache_file": "x"}}, "none")
    assert [problem.partition(":")[0] for problem in problems] == [
        "peft_config.init_lora_weights",
        "peft_config.corda_config belongs to `init_lora_weights",
    ]


@pytest.mark.parametrize(
    ("peft", "moved"),
    [
        ({"init_lora_weights": "olora"}, True),
        ({"kasa_config": {"beta": 1.0}}, True),
        ({"layer_replication": [(0, 2), (1, 2)]}, True),
        ({"use_dora": True, "init_lora_weights": "mica"}, False),
        ({"modules_to_save": ["lm_head"], "kasa_config": None, "layer_replication": None}, False),
    ],
)
def test_an_adapter_that_moves_its_base_is_known(peft: dict[str, object], moved: bool) -> None:
    assert moves_the_base(peft) == moved


@pytest.mark.parametrize("start", ["pissa_niter_4", "corda", "lora_ga", "loftq"])
def test_a_base_that_can_not_be_moved_again_is_told(start: str) -> None:
    assert "which changed the base's weights" in str(why_not_begun_again(start))


@pytest.mark.parametrize("start", ["pissa", "olora", "eva", True])
def test_a_base_that_stays_or_moves_alike_is_no_problem(start: object) -> None:
    assert why_not_begun_again(start) is None


def test_the_table_is_read_without_torch() -> None:
    code = "import sys, phinetune.engine.peft_variants; assert not {'torch', 'peft'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("peft", "said"),
    [
        ({"lora_bias": True}, "peft_config.lora_bias trains, but the adapter can't be merged later: Phi-3's layers"),
        (
            {"trainable_token_indices": [1]},
            "peft_config.trainable_token_indices trains, but the adapter can't be merged",
        ),
        ({"use_bdlora": True}, "peft_config.use_bdlora trains, but the adapter can't be merged later: BD-LoRA is not"),
    ],
)
def test_what_can_not_be_merged_later_is_told_at_the_start(peft: dict[str, object], said: str) -> None:
    (note,) = start_notes(peft)
    assert note.startswith(said)
    assert start_notes({"use_dora": True, "lora_bias": False, "modules_to_save": ["lm_head"]}) == []
