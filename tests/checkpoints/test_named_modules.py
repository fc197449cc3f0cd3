"""Every entry of `peft_config` that names a part of the model names one that there is, or is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from helpers import TINY, tiny_config, train_only
from phinetune.api.plan import plan_config
from phinetune.checkpoints.load import Loaded
from phinetune.checkpoints.named_modules import resolve_names, told_split
from phinetune.checkpoints.tokenizer import open_config
from phinetune.config.model import ModelSection
from phinetune.errors import ConfigError
from phinetune.training.rehearsal import adapted_shape, rehearse_adapter
from phinetune.training.settings import read_settings

LAYERS = "there are down_proj, gate_up_proj, o_proj, qkv_proj"


def adapted(**peft: Any) -> Any:
    return rehearse_adapter(read_settings(peft, {}), open_config(ModelSection(path=TINY)))


def trained(**peft: Any) -> set[str]:
    """The modules that train, without the model's prefix."""
    names = (name for name, p in adapted(**peft).named_parameters() if p.requires_grad)
    return {name.removeprefix("base_model.model.").removeprefix("model.").split(".lora_")[0] for name in names}


@pytest.mark.parametrize(
    ("peft", "words"),
    [
        ({"modules_to_save": ["lm_heads"]}, "peft_config.modules_to_save: `lm_heads` matches no module; there are"),
        ({"modules_to_save": ["lm_head", "embed"]}, "`embed` matches no module"),
        ({"exclude_modules": ["oproj"]}, f"peft_config.exclude_modules: `oproj` matches no linear layer; {LAYERS}"),
        ({"exclude_modules": r".*\.9\..*"}, "matches no linear layer"),
        ({"exclude_modules": "("}, "`(` is no regular expression"),
        ({"rank_pattern": {"attn": 4}}, f"peft_config.rank_pattern: `attn` matches no linear layer; {LAYERS}"),
        ({"rank_pattern": {"(": 4}}, "rank_pattern: `(` is no regular expression"),
        ({"rank_pattern": {"o_proj": 0}}, "peft_config.rank_pattern.o_proj: it should be a whole number of 1 or more"),
        ({"alpha_pattern": {"o_proj": "8"}}, "peft_config.alpha_pattern.o_proj: it should be a number above 0"),
        ({"alpha_pattern": {"layers.7.o_proj": 8}}, "`layers.7.o_proj` matches no linear layer"),
        (
            {"rank_pattern": {"down_proj": 4}, "target_modules": ["o_proj"]},
            "`down_proj` matches no layer that has an adapter; these are o_proj",
        ),
        ({"rank_pattern": {"q_proj": 4, "v_proj": 8}}, "`qkv_proj` is one layer here and can't have both 4 and 8"),
        ({"layers_to_transform": [0, 2]}, "peft_config.layers_to_transform: there is no layer 2; there are 0 to 1"),
        ({"layers_to_transform": -1}, "there is no layer -1"),
        ({"layers_to_transform": []}, "the list is empty"),
        ({"layers_to_transform": [0], "layers_pattern": ["blocks"]}, "`blocks` matches no list of layers"),
        ({"layer_replication": [[0, 3]]}, "peft_config.layer_replication: [0, 3] is no range of layers"),
        ({"target_parameters": ["experts.weight"]}, "`experts.weight` matches no parameter; there are"),
        ({"trainable_token_indices": [300]}, "there is no token 300; there are 0 to 299"),
        ({"trainable_token_indices": {"embed": [3]}}, "`embed` matches no embedding; there are model.embed_tokens"),
        ({"trainable_token_indices": []}, "there is no token in it"),
        ({"alora_invocation_tokens": [-2]}, "peft_config.alora_invocation_tokens: there is no token -2"),
    ],
)
def test_what_matches_nothing_is_refused_with_the_names_that_there_are(peft: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        adapted(**peft)
    assert words in str(caught.value)


def test_all_problems_are_told_at_once(tiny: Loaded) -> None:
    peft = {
        "target_modules": ["proj"],
        "modules_to_save": ["head"],
        "rank_pattern": {"x": 4},
        "alpha_pattern": {"y": 4},
    }
    with pytest.raises(ConfigError) as caught:
        resolve_names(tiny.model, peft)
    assert len(caught.value.problems) == 4


@pytest.mark.parametrize(
    ("peft", "names"),
    [
        ({"exclude_modules": ["q_proj", "gate_proj", "down_proj"]}, {"self_attn.o_proj"}),
        ({"exclude_modules": ".*proj", "target_modules": ["o_proj"], "modules_to_save": ["norm"]}, None),
        ({"layers_to_transform": 1, "target_modules": ["v_proj"]}, {"self_attn.qkv_proj"}),
        (
            {"layers_to_transform": [1], "exclude_modules": ["mlp.down_proj", "gate_up_proj", "o_proj"]},
            {"self_attn.qkv_proj"},
        ),
    ],
)
def test_split_names_are_understood_as_in_target_modules(peft: dict[str, Any], names: set[str] | None) -> None:
    if names is None:
        with pytest.raises(ConfigError, match="No modules were targeted for adaptation"):
            trained(**peft)
        return
    layers = {1} if "layers_to_transform" in peft else {0, 1}
    assert trained(**peft) == {f"layers.{layer}.{name}" for layer in layers for name in names}


@pytest.mark.parametrize("key", ["q_proj", "self_attn.k_proj", r".*\.v_proj", "(q_proj|v_proj)", "qkv_proj"])
def test_a_pattern_of_split_names_sets_the_fused_layers_rank(key: str) -> None:
    model = adapted(rank_pattern={key: 3}, alpha_pattern={key: 9})
    layer = model.get_base_model().model.layers[1].self_attn
    assert (layer.qkv_proj.r["default"], layer.qkv_proj.scaling["default"]) == (3, 3.0)
    assert (layer.o_proj.r["default"], layer.o_proj.scaling["default"]) == (16, 2.0)


def test_both_split_names_may_ask_for_the_same() -> None:
    layer = adapted(rank_pattern={"q_proj": 4, "v_proj": 4}).get_base_model().model.layers[0]
    assert layer.self_attn.qkv_proj.r["default"] == 4


def test_parts_that_are_saved_whole_and_single_tokens_and_parameters_are_found() -> None:
    assert any("lm_head.modules_to_save" in name for name in trained(modules_to_save=["lm_head"]))
    assert any("qkv_proj.modules_to_save" in name for name in trained(modules_to_save=["q_proj"]))
    assert any("trainable_tokens" in name for name in trained(trainable_token_indices={"embed_tokens": [3, 299]}))
    only = adapted(target_parameters=["mlp.down_proj.weight"])
    assert {name.split(".mlp.")[1].split(".")[0] for name, p in only.named_parameters() if p.requires_grad} == {
        "down_proj"
    }


def test_a_model_without_weights_has_the_runs_parameters() -> None:
    settings = read_settings({"r": 4}, {})
    model = adapted_shape(settings, open_config(ModelSection(path=TINY)), torch.bfloat16)
    assert {p.device.type for p in model.parameters()} == {"meta"}


@pytest.mark.parametrize("way", [plan_config, train_only], ids=["plan", "train"])
def test_plan_and_train_refuse_the_same(chats: Path, tmp_path: Path, way: Any) -> None:
    config = tiny_config(chats, tmp_path / "run")
    config.peft_config["modules_to_save"] = ["lm_heads"]
    with pytest.raises(ConfigError, match="`lm_heads` matches no module"):
        way(config)


def test_a_run_that_names_one_layer_has_a_plan(chats: Path, tmp_path: Path) -> None:
    """The plan measures two layers, whatever the number of the layer that is named."""
    config = tiny_config(chats, tmp_path / "run")
    config.model.path = TINY.replace("layers: 2", "layers: 4")
    config.peft_config |= {
        "target_modules": ["model.layers.3.self_attn.o_proj"],
        "rank_pattern": {"layers.3.*o_proj": 2},
    }
    made = plan_config(config)
    assert made.trainable == 2 * (32 + 32)
    assert made.seconds


@pytest.mark.parametrize(
    ("peft", "said"),
    [
        ({"exclude_modules": ["q_proj"]}, "peft_config.exclude_modules: `q_proj`: taken as `qkv_proj`"),
        ({"modules_to_save": ["layers.1.self_attn.v_proj"]}, "peft_config.modules_to_save: `v_proj`: taken as"),
        ({"rank_pattern": {"(q_proj|v_proj)": 8}}, "peft_config.rank_pattern: `q_proj`, `v_proj`: taken as"),
        ({"target_modules": ["gate_proj", "o_proj"]}, "`gate_proj`: taken as `gate_up_proj`"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_a_part_that_stands_for_a_whole_layer_is_told(peft: dict[str, Any], said: str) -> None:
    (line,) = read_settings(peft, {}).notes
    assert said in line
    assert line.endswith(("that holds q_proj, k_proj, v_proj", "that holds gate_proj, up_proj"))


def test_all_parts_of_a_layer_or_its_own_name_are_not_told() -> None:
    assert told_split({"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj"]}) == []
    assert told_split({"target_modules": "all-linear", "exclude_modules": None}) == []
