"""The table of PEFT's variants: its keys are PEFT's own, and each part of phinetune reads its column."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest
from peft import LoraConfig

from phinetune.engine.peft_variants import (
    VARIANTS,
    changes_the_base,
    not_converted,
    not_fast,
    not_merged,
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


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_16", "PiSSA", "corda", "olora", "mica", "loftq", "lora_ga"])
def test_an_initialisation_that_changes_the_base_is_recognised(start: str) -> None:
    assert changes_the_base(start)
    problem = why_not_the_whole_update(start)
    assert problem
    assert problem.startswith(f"`init_lora_weights` is {start!r}, which changed the base's weights")


@pytest.mark.parametrize("start", [True, False, None, "gaussian", "orthogonal", "eva"])
def test_an_initialisation_that_leaves_the_base_alone_is_no_problem(start: object) -> None:
    assert not changes_the_base(start)
    assert why_not_the_whole_update(start) is None


def test_the_table_is_read_without_torch() -> None:
    code = "import sys, phinetune.engine.peft_variants; assert not {'torch', 'peft'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)
