"""What is not converted is named, nothing is overwritten, and the check finds a damaged conversion."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import loralib
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

import phinetune.lora as lora
from exporting.convert.convert_helpers import Attention, adapted_net, peft_net, save
from phinetune.errors import ModelError
from phinetune.exporting.convert import convert as module
from phinetune.exporting.convert.convert import convert


def refused(tmp_path: Path, src: Path, to: str, **options: Any) -> str:
    """The sentences with which a conversion is refused; nothing may be left behind."""
    dst = tmp_path / "refused"
    before = sorted(p.name for p in tmp_path.iterdir())
    with pytest.raises(ModelError) as caught:
        convert(src, dst, to, **options)
    assert sorted(p.name for p in tmp_path.iterdir()) == before
    return str(caught.value)


@pytest.mark.filterwarnings("ignore:Adapter 'default'")
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"use_dora": True}, ["`use_dora` is set", "block.up.lora_magnitude_vector"]),
        ({"modules_to_save": ["head"]}, ["`modules_to_save` is set", "head.weight is not a LoRA tensor"]),
        ({"lora_bias": True}, ["`lora_bias` is set", "up.lora_B.bias is not a LoRA tensor"]),
        ({"bias": "lora_only"}, ["`bias` is 'lora_only'", "up.base_layer.bias is not a LoRA tensor"]),
        ({"init_lora_weights": "pissa"}, ["which changed the base's weights"]),
    ],
    ids=["dora", "modules_to_save", "lora_bias", "bias", "pissa"],
)
def test_an_adapter_that_is_more_than_a_and_b_is_refused(
    tmp_path: Path, options: dict[str, Any], words: list[str]
) -> None:
    _, folder = peft_net(tmp_path / "peft", target_modules=["up"], **options)
    text = refused(tmp_path, folder, "loralib")
    assert all(part in text for part in words), text


def test_broken_peft_tensors_are_named(tmp_path: Path) -> None:
    _, folder = peft_net(tmp_path / "peft", target_modules=["up", "head", "qkv_proj"])
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    start = "base_model.model."
    tensors[f"{start}emb.base_layer.weight"] = torch.ones(2)
    tensors[f"{start}conv.lora_A.weight"] = torch.ones(2, 3, 3, 3)
    tensors[f"{start}conv.lora_B.weight"] = torch.ones(4, 2, 1, 1)
    del tensors[f"{start}head.lora_B.weight"]
    tensors[f"{start}block.up.lora_A.weight"][0, 0] = torch.nan
    save_file(tensors, file)
    text = refused(tmp_path, folder, "loralib")
    for words in (
        "emb.base_layer.weight is not a LoRA tensor but a copy of the base's weights",
        "conv: a convolution's adapter",
        "head: lora_B is missing",
        "block.up: its adapter holds values that are not finite",
    ):
        assert words in text


def test_a_damaged_peft_file_is_refused(tmp_path: Path) -> None:
    _, folder = peft_net(tmp_path / "peft", target_modules=["up"])
    (folder / "adapter_model.safetensors").write_bytes(b"x" * 30)
    assert "damaged" in refused(tmp_path, folder, "loralib")


def test_a_rank_unlike_the_configuration_is_refused(tmp_path: Path) -> None:
    _, folder = peft_net(tmp_path / "peft", target_modules=["up"])
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "r": 8}))
    assert "the configuration says rank 8, but lora_A has 4 rows" in refused(tmp_path, folder, "loralib")


@pytest.mark.parametrize(
    ("merged", "words"),
    [
        ("qkv_proj=4,4,5", "--merged adds up to 13 rows; the layer has 12"),
        ("qkv_proj=4,-4,4", "its rows of lora_B are not zero"),
        ("qkv=4,4,4", "--merged qkv: no layer with an adapter has this name; there are emb, qkv_proj, up"),
        ("emb=3,3", "this is an embedding"),
        ("qkv_proj=4,x", "expected NAME=ROWS,ROWS"),
        ("qkv_proj", "expected NAME=ROWS,ROWS"),
        ("qkv_proj=12,0", "expected NAME=ROWS,ROWS"),
        ("qkv_proj=-4,-4,-4", "no split has an adapter"),
    ],
    ids=["rows", "not zero", "unknown name", "embedding", "no number", "no rows", "zero rows", "none adapted"],
)
def test_wrong_splits_of_a_peft_adapter_are_refused(tmp_path: Path, merged: str, words: str) -> None:
    _, folder = peft_net(tmp_path / "peft", target_modules=["qkv_proj", "up", "emb"])
    assert words in refused(tmp_path, folder, "loralib", merged=[merged])


@pytest.mark.parametrize(
    ("merged", "ranks", "words"),
    [
        ("qkv_proj=4,2,2", {"v_proj": 3}, "must have the same rank; here they have q_proj 2, k_proj 2, v_proj 3"),
        ("qkv_proj=4,-2,2", {}, "--merged says that k_proj has no adapter, but it has one"),
        ("qkv_proj=2,4,2", {}, "--merged gives q_proj 2 rows; it has 4"),
        ("qkv_proj=4,4", {}, "--merged gives 2 splits; the layer has q_proj, k_proj, v_proj"),
    ],
    ids=["ranks", "adapted", "rows", "count"],
)
def test_split_adapters_that_are_no_merged_linear_are_refused(
    tmp_path: Path, merged: str, ranks: dict[str, int], words: str
) -> None:
    targets = ["q_proj", "k_proj", "v_proj"]
    config = LoraConfig(r=2, lora_alpha=4, target_modules=targets, rank_pattern=ranks)
    get_peft_model(Attention(), config).save_pretrained(str(tmp_path / "peft"))
    assert words in refused(tmp_path, tmp_path / "peft", "loralib", merged=[merged])


@pytest.mark.parametrize(
    ("merged", "words"),
    [
        ([], "2 splits of rank 3 with 8 rows together; give the splits with --merged qkv_proj="),
        (["qkv_proj=4,4,4"], "--merged says 3 splits with adapters; lora_A has 6 rows"),
        (["qkv_proj=2,-4,4"], "--merged gives the adapters 6 rows; lora_B has 8"),
    ],
    ids=["missing", "count", "rows"],
)
def test_a_merged_linear_needs_its_splits(tmp_path: Path, merged: list[str], words: str) -> None:
    on = [True, False, True]
    net = adapted_net(qkv_proj=lambda: loralib.MergedLinear(6, 12, r=3, enable_lora=on))
    file = save(net, tmp_path / "lora.pt")
    assert words in refused(tmp_path, file, "peft", lora_alpha=1, merged=merged)


def test_convolutions_of_loralib_are_refused(tmp_path: Path) -> None:
    net = nn.ModuleDict(
        {
            "conv1": loralib.Conv2d(3, 6, 3, r=2, lora_alpha=4),
            "second": loralib.Conv2d(3, 6, 3, r=2, lora_alpha=4),
            "head": loralib.Linear(6, 3, r=2, lora_alpha=4),
            "conv_head": loralib.Linear(6, 3, r=2, lora_alpha=4),
        }
    )
    file = save(net, tmp_path / "lora.pt")
    text = refused(tmp_path, file, "peft", lora_alpha=4, linear=["conv_head"])
    assert [line.split(":")[0] for line in text.splitlines()] == ["conv1", "second"]
    assert "loralib's convolutions have no form in PEFT" in text
    torch.save(loralib.lora_state_dict(net, bias="all"), file)
    assert "conv1.conv.bias belongs to a convolution" in refused(tmp_path, file, "peft", lora_alpha=4)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"up.lora_A": torch.ones(2, 3), "up.weight": torch.ones(3, 3)}, "up.weight is neither a lora_A nor a lora_B"),
        ({"up.lora_A": torch.ones(2, 3)}, "up: lora_B is missing"),
        ({"up.lora_A": torch.ones(3, 3), "up.lora_B": torch.ones(3, 2)}, "which do not fit together"),
        ({"up.lora_A": torch.ones(2), "up.lora_B": torch.ones(3, 2)}, "must be matrices"),
        ({}, "the adapter holds no LoRA tensor"),
        ([1], "holds a list, not a state dict"),
        (nn.Linear(2, 2), "not a checkpoint of tensors that can be read"),
    ],
    ids=["another tensor", "no lora_B", "ranks", "vector", "empty", "list", "module"],
)
def test_files_that_are_no_loralib_checkpoint_are_refused(tmp_path: Path, content: Any, words: str) -> None:
    torch.save(content, tmp_path / "lora.pt")
    assert words in refused(tmp_path, tmp_path / "lora.pt", "peft", lora_alpha=1)


@pytest.fixture
def places(tmp_path: Path) -> Path:
    """A folder with a loralib checkpoint, `lora.pt`, and a folder that is not an adapter, `mine`."""
    torch.save({"up.lora_A": torch.ones(2, 3), "up.lora_B": torch.ones(3, 2)}, tmp_path / "lora.pt")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    return tmp_path


def test_options_and_places_are_refused_together(places: Path) -> None:
    with pytest.raises(ModelError) as caught:
        convert(places / "lora.pt", places / "mine", "peft", merged=["x"])
    assert len(caught.value.problems) == 3
    for words in ("give the layers' alpha with --lora-alpha", "mine: is there already", "--merged x: expected"):
        assert words in str(caught.value)
    assert (places / "mine" / "thesis.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("source", "to", "options", "words"),
    [
        ("lora.pt", "onnx", {}, "must be one of peft, loralib, peft-split, peft-fused, not onnx"),
        ("lora.pt", "peft", {"lora_alpha": 0}, "--lora-alpha must be above 0"),
        ("lora.pt", "peft", {"lora_alpha": 1, "embedding": ["up2"]}, "--embedding up2: no layer"),
        ("lora.pt", "loralib", {}, "--to loralib takes a PEFT adapter folder"),
        ("mine", "peft", {"lora_alpha": 1}, "--to peft takes a loralib checkpoint"),
        ("none", "loralib", {}, "none: no such file"),
        ("none", "loralib", {"base": "x"}, "--base only goes with --to peft"),
        ("none", "loralib", {"linear": ["y"]}, "--linear only goes with --to peft"),
        ("mine", "loralib", {}, "no adapter there"),
    ],
    ids=["form", "alpha", "embedding", "a file", "a folder", "nothing", "base", "linear", "no adapter"],
)
def test_a_wrong_option_or_place_is_refused(
    places: Path, source: str, to: str, options: dict[str, Any], words: str
) -> None:
    assert words in refused(places, places / source, to, **options)


# -- the check -------------------------------------------------------------------------------------------------


def test_a_damaged_checkpoint_is_found_and_not_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, folder = peft_net(tmp_path / "peft", target_modules=["up", "head"])
    honest = module.write_loralib

    def tamper(adapters: Any, file: Path) -> None:
        honest(adapters, file)
        state = torch.load(file, weights_only=True)
        state["block.up.lora_B"][0] *= 1.001
        torch.save(state, file)

    monkeypatch.setattr(module, "write_loralib", tamper)
    text = refused(tmp_path, folder, "loralib")
    assert "the conversion failed its check, so nothing was written" in text
    assert "block.up: its update differs by" in text
    assert "head" not in text


@pytest.mark.parametrize("damage", ["tensor", "scale", "lost"])
def test_a_damaged_peft_folder_is_found_and_not_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    net = adapted_net(up=lambda: lora.Linear(12, 10, r=2, lora_alpha=4), head=lambda: lora.Linear(10, 3, r=2))
    file = save(net, tmp_path / "lora.pt")
    honest = module.write_peft

    def tamper(adapters: Any, folder: Path, base: str | None) -> None:
        kept = {name: one for name, one in adapters.items() if damage != "lost" or name != "head"}
        honest(kept, folder, base)
        weights, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
        if damage == "tensor":
            tensors = load_file(weights)
            tensors["base_model.model.head.lora_A.weight"] += 1e-3
            save_file(tensors, weights)
        if damage == "scale":
            config.write_text(json.dumps({**json.loads(config.read_text()), "use_rslora": True}))

    monkeypatch.setattr(module, "write_peft", tamper)
    words = "head: not converted" if damage == "lost" else "head: its update differs by"
    assert words in refused(tmp_path, file, "peft", lora_alpha=4)
