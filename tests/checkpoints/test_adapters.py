"""Where LoRA goes, and adapters onto their base."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from helpers import TINY
from phinetune.checkpoints.adapters import attach_adapter, read_base, usable_adapter
from phinetune.checkpoints.load import Loaded, load_base
from phinetune.checkpoints.opened import open_model
from phinetune.checkpoints.target_modules import linear_layers, matched_targets, resolve_targets, trainable_parameters
from phinetune.config.model import ModelSection
from phinetune.errors import ConfigError, ModelError


def test_all_linear_layers_but_the_head_are_found(tiny: Loaded) -> None:
    names = {name.rsplit(".", 1)[-1] for name in linear_layers(tiny.model)}
    assert names == {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}
    assert len(linear_layers(tiny.model)) == 8


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        (None, "all-linear"),
        ("all-linear", "all-linear"),
        (["qkv_proj", "o_proj"], ["qkv_proj", "o_proj"]),
        (["q_proj", "k_proj", "v_proj", "o_proj"], ["qkv_proj", "o_proj"]),
        (["gate_proj", "up_proj", "down_proj"], ["gate_up_proj", "down_proj"]),
        (["layers.1.self_attn.v_proj"], ["layers.1.self_attn.qkv_proj"]),
        (r".*layers\.0\..*qkv_proj", r".*layers\.0\..*qkv_proj"),
    ],
    ids=["none", "all-linear", "fused names", "split attention", "split mlp", "one layer", "pattern"],
)
def test_targets_by_either_naming(tiny: Loaded, wanted: Any, found: Any) -> None:
    assert resolve_targets(tiny.model, wanted) == found


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        (["qkv_proj", "query"], "`query` matches no linear layer; there are down_proj, gate_up_proj"),
        ([], "the list is empty"),
        ("qkv_proj", "written with brackets"),
        ("(", "no regular expression"),
    ],
    ids=["unknown name", "empty list", "name as pattern", "broken pattern"],
)
def test_a_target_that_matches_nothing_is_refused(tiny: Loaded, wanted: Any, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve_targets(tiny.model, wanted)
    assert words in str(caught.value)


def test_the_matched_table_counts_parameters_by_the_formula(tiny: Loaded) -> None:
    model = get_peft_model(tiny.model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    targets = {t.name: t for t in matched_targets(model)}
    # hidden 32, intermediate 64, 4 heads and 2 key-value heads of width 8
    shapes = {"qkv_proj": (64, 32), "o_proj": (32, 32), "gate_up_proj": (128, 32), "down_proj": (32, 64)}
    assert {n: (t.out_features, t.in_features) for n, t in targets.items()} == shapes
    assert all(t.parameters == 2 * 4 * sum(shapes[n]) and t.count == 2 for n, t in targets.items())
    trains, total = trainable_parameters(model)
    assert trains == sum(t.parameters for t in targets.values())
    assert total > trains


def test_an_adapter_answers_as_in_plain_peft(tiny_run: Path, tiny: Loaded) -> None:
    ids = torch.tensor([[5, 6, 7]])
    section = ModelSection(path=TINY)
    ours = attach_adapter(load_base(section), tiny_run, usable_adapter(tiny_run, section))
    plain = PeftModel.from_pretrained(tiny.model, str(tiny_run))
    with torch.no_grad():
        assert torch.equal(ours(ids).logits, plain(ids).logits)
        with ours.disable_adapter():
            assert not torch.equal(ours(ids).logits, plain(ids).logits)


def copy_adapter(run: Path, target: Path, without: tuple[str, ...] = ()) -> Path:
    target.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors", "base.json"):
        if name not in without:
            (target / name).write_bytes((run / name).read_bytes())
    return target


def test_an_adapter_for_another_base_is_refused(tiny_run: Path) -> None:
    with pytest.raises(ModelError, match="another model; load the adapter on the base it was trained on"):
        usable_adapter(tiny_run, ModelSection(path=TINY, seed=1))


def test_all_tensors_that_do_not_fit_are_listed(tiny_run: Path, tmp_path: Path) -> None:
    folder = copy_adapter(tiny_run, tmp_path / "adapter", without=("base.json",))
    tensors = load_file(folder / "adapter_model.safetensors")
    names = sorted(tensors)
    tensors["extra"] = tensors.pop(names[0])
    tensors[names[1]] = tensors[names[1]][:, :-1].contiguous()
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(ModelError) as caught:
        usable_adapter(folder, ModelSection(path=TINY))
    text = "\n".join(caught.value.problems)
    assert f"missing: {names[0]}" in text
    assert "unexpected: extra" in text
    assert f"{names[1]}: adapter shape" in text


@pytest.mark.parametrize(
    ("break_it", "words"),
    [
        (lambda f: (f / "adapter_model.safetensors").unlink(), "no adapter there"),
        (lambda f: (f / "adapter_model.safetensors").write_bytes(b"x" * 20), "damaged"),
        (lambda f: (f / "base.json").write_text("{}"), "base.json: broken"),
        (lambda f: (f / "adapter_config.json").write_text("{"), "adapter_config.json: broken JSON"),
        (
            lambda f: (f / "adapter_config.json").write_text(json.dumps({"peft_type": "IA3"})),
            "only LoRA is supported",
        ),
    ],
    ids=["no weights", "damaged weights", "broken base.json", "broken configuration", "no LoRA"],
)
def test_a_broken_adapter_is_refused(tiny_run: Path, tmp_path: Path, break_it: Any, words: str) -> None:
    folder = copy_adapter(tiny_run, tmp_path / "adapter")
    break_it(folder)
    with pytest.raises(ModelError) as caught:
        usable_adapter(folder, ModelSection(path=TINY))
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("rename", "words"),
    [
        (lambda name: name.replace(".lora_A.", ".lora_A.default."), "save the adapter with PEFT's save_pretrained"),
        (lambda name: name.removeprefix("base_model.model."), "the names lack `base_model.model.`"),
        (lambda name: name.replace("qkv_proj", "q_proj"), "`phinetune convert … --to peft-fused` joins them"),
        (lambda name: name.replace("lora_A", "base_layer"), "weights of the base, too"),
    ],
    ids=["state dict", "no prefix", "split layers", "layers of the base"],
)
def test_another_form_of_an_adapter_is_named(
    tiny_run: Path, tmp_path: Path, rename: Callable[[str], str], words: str
) -> None:
    folder = copy_adapter(tiny_run, tmp_path / "adapter", without=("base.json",))
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file({rename(name): tensor for name, tensor in tensors.items()}, folder / "adapter_model.safetensors")
    with pytest.raises(ModelError, match=words):
        usable_adapter(folder, ModelSection(path=TINY))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"target_modules": ["q_proj", "v_proj"]}, "does not fit this base .*--to peft-fused"),
        ({"target_modules": ["query"]}, r"does not fit this base: .*query"),
        ({"r": 0}, "`r` should be a whole number of 1 or more"),
    ],
    ids=["split layers", "unknown layer", "no rank"],
)
def test_a_configuration_that_does_not_fit_is_told(
    tiny_run: Path, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    folder = copy_adapter(tiny_run, tmp_path / "adapter")
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    with pytest.raises(ModelError, match=words):
        usable_adapter(folder, ModelSection(path=TINY))


@pytest.mark.parametrize("changes", [{"fingerprint": None}, {"path": 5}, {"revision": 1}, {"seed": "x"}, {"more": 1}])
def test_a_record_of_the_base_is_checked(tiny_run: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    folder = copy_adapter(tiny_run, tmp_path / "adapter")
    file = folder / "base.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    with pytest.raises(ModelError, match=r"base\.json: broken"):
        read_base(folder)


def test_a_damaged_adapter_is_told_before_the_base_is_loaded(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("phinetune.checkpoints.opened.load_base", lambda *_, **__: pytest.fail("the base was loaded"))
    folder = copy_adapter(tiny_run, tmp_path / "adapter")
    (folder / "adapter_model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ModelError, match="Git LFS pointer"):
        open_model(folder)


def test_an_adapter_of_no_numbers_is_refused(tiny_run: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_run, tmp_path / "run")
    file = tmp_path / "run" / "adapter_model.safetensors"
    tensors = load_file(file)
    name = sorted(tensors)[0]
    tensors[name][0, 0] = float("nan")
    save_file(tensors, file)
    with pytest.raises(ModelError, match=f"{name}: 1 of"):
        open_model(tmp_path / "run")
