"""Weights in nf4 as the files hold them: unpacked to the bit; what does not fit together is told before it is read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.utils.integrations import dequantize_module_weight
from safetensors.torch import load_file, save_file
from torch import Tensor

from helpers import nf4_checkpoint
from phinetune.checkpoints.load import load_base, read_config
from phinetune.checkpoints.packed_weights import LARGEST_STATE, STATE, packed_weights, unpacked_view
from phinetune.checkpoints.target_modules import linear_layers
from phinetune.checkpoints.weight_files import held_tensors
from phinetune.checkpoints.whole import check_whole
from phinetune.config.model import ModelSection
from phinetune.errors import ModelError

pytest.importorskip("bitsandbytes")

Tensors = dict[str, Tensor]
DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("family", ["phi3", "llama"])
def test_unpacked_they_are_what_a_product_sees(family: str, double: bool, tmp_path: Path) -> None:
    base = nf4_checkpoint(tmp_path / "base", family, bnb_4bit_use_double_quant=double)
    held = held_tensors(base)
    packed = packed_weights(held, "here")
    layers = linear_layers(load_base(ModelSection(path=str(base), dtype="float32"), fast=False).model)
    assert set(packed) == {f"{name}.weight" for name in layers}
    for name, layer in layers.items():
        assert torch.equal(packed[f"{name}.weight"].unpacked(), dequantize_module_weight(layer))
    view = unpacked_view(held, packed)
    assert (view[DOWN].shape, view[DOWN].dtype) == ((64, 96), "F32")
    assert not [name for name in view if "absmax" in name or "quant" in name]


def state_with(**changes: Any) -> Callable[[Tensors], Tensors]:
    """The JSON of a weight with other values; None takes a key out."""

    def change(tensors: Tensors) -> Tensors:
        tree = json.loads(bytes(tensors[f"{DOWN}.{STATE}"].tolist())) | changes
        text = json.dumps({key: value for key, value in tree.items() if value is not None}).encode()
        return tensors | {f"{DOWN}.{STATE}": torch.tensor(list(text), dtype=torch.uint8)}

    return change


def without(*ends: str) -> Callable[[Tensors], Tensors]:
    names = {f"{DOWN}.{end}" if end else DOWN for end in ends}
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if name not in names}


def holding(end: str, tensor: Tensor) -> Callable[[Tensors], Tensors]:
    return lambda tensors: tensors | {f"{DOWN}.{end}" if end else DOWN: tensor}


BYTES = torch.zeros(LARGEST_STATE + 1, dtype=torch.uint8)
DAMAGES: list[tuple[Callable[[Tensors], Tensors], str]] = [
    (without("absmax"), "absmax is missing"),
    (without("nested_absmax"), "nested_absmax is missing"),
    (without("quant_map"), "quant_map is missing"),
    (without(""), "the weight is not"),
    (holding("", BYTES[:100, None]), "the packed weight is 100 of U8, and must be 3,072 of U8"),
    (holding("", torch.zeros(3072, 1)), "the packed weight is 3,072 of F32, and must be 3,072 of U8"),
    (holding("absmax", BYTES[:95]), "absmax is 95 of U8, and must be 96 of U8"),
    (holding("nested_absmax", torch.zeros(2)), "nested_absmax is 2 of F32, and must be 1 of F32"),
    (holding("quant_map", torch.zeros(15)), "quant_map is 15 of F32, and must be 16 of F32"),
    (holding("nested_quant_map", torch.zeros(16)), "nested_quant_map is 16 of F32, and must be 256 of F32"),
    (holding(STATE, BYTES), "is 4,097 bytes of U8, and must be at most 4,096 of U8"),
    (holding(STATE, BYTES[:9]), "can't be read"),
    (holding(STATE, torch.tensor(list(b"[1]"), dtype=torch.uint8)), "must have the keys blocksize, dtype, quant_type"),
    (state_with(blocksize=None), "must have the keys blocksize, dtype, quant_type, shape"),
    (state_with(blocksize=63), "blocksize is 63, and must be one of 32, 64"),
    (state_with(nested_blocksize=0), "nested_blocksize is 0, and must be one of"),
    (state_with(shape=[64, -96]), "shape is [64, -96], and must be two numbers above 0"),
    (state_with(shape=[64, 96, 1]), "must be two numbers above 0"),
    (state_with(quant_type="fp4"), "quant_type is 'fp4', and must be 'nf4'"),
    (state_with(dtype="int8"), "dtype is 'int8', and must be one of float32, bfloat16, float16"),
    (state_with(nested_dtype="float16"), "nested_dtype is 'float16'"),
    (state_with(nested_offset=float("nan")), "nested_offset is nan, and must be a number"),
    (
        state_with(nested_blocksize=None, nested_dtype=None, nested_offset=None),
        "says nothing of nested_absmax, nested_quant_map",
    ),
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return nf4_checkpoint(tmp_path_factory.mktemp("nf4") / "base", "llama")


def rewritten(whole: Path, folder: Path, change: Callable[[Tensors], Tensors]) -> Path:
    folder.mkdir()
    for file in whole.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    save_file(change(load_file(whole / "model.safetensors")), folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(("change", "words"), DAMAGES, ids=[words for _, words in DAMAGES])
def test_parts_that_do_not_fit_together_are_told(
    whole: Path, tmp_path: Path, change: Callable[[Tensors], Tensors], words: str
) -> None:
    folder = rewritten(whole, tmp_path / "damaged", change)
    with pytest.raises(ModelError) as caught:
        check_whole(folder, read_config(folder))
    lines = str(caught.value).splitlines()
    assert lines[0] == f"{folder}: these quantised weights are damaged:"
    assert lines[1].startswith(f"{DOWN}: ")
    assert words in lines[1]


def test_a_shape_that_is_not_the_configurations_is_told(whole: Path, tmp_path: Path) -> None:
    folder = rewritten(whole, tmp_path / "turned", state_with(shape=[96, 64]))
    with pytest.raises(ModelError, match=r"shape \(96, 64\) does not match the configuration's \(64, 96\)"):
        check_whole(folder, read_config(folder))


def test_scales_that_are_no_numbers_are_told(whole: Path, tmp_path: Path) -> None:
    folder = rewritten(whole, tmp_path / "nan", holding("nested_absmax", torch.tensor([torch.nan])))
    with pytest.raises(ModelError, match=f"{DOWN}.nested_absmax: 1 of 1 values are not finite"):
        load_base(ModelSection(path=str(folder), dtype="float32"))
