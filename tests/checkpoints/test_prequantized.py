"""Checkpoints that are quantised already: nf4 is taken as it is, every other form is refused by its name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers import nf4_checkpoint, tiny_config
from phinetune.checkpoints import prequantized
from phinetune.checkpoints.load import load_base, read_config
from phinetune.checkpoints.prequantized import held_as, is_held_so, own_form
from phinetune.checkpoints.quantize import kind_of
from phinetune.checkpoints.whole import check_whole
from phinetune.config.model import ModelSection
from phinetune.errors import ConfigError, ModelError
from phinetune.exporting.base_files import open_base
from phinetune.exporting.onnx.model import _folder_for_builder
from phinetune.training.prepare import prepare_run, settle

pytest.importorskip("bitsandbytes")

NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return nf4_checkpoint(tmp_path_factory.mktemp("nf4") / "base", "llama", llm_int8_skip_modules=["lm_head", "o_proj"])


def with_config(folder: Path, quantization: object) -> Path:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "quantization_config": quantization}))
    return folder


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "fp8"}, "fp8"),
        ({"bits": 4}, "of an unknown kind"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes, load_in_8bit"),
        ({"quant_method": "bitsandbytes"}, "bitsandbytes, without load_in_4bit"),
        ({**NF4, "bnb_4bit_quant_type": None}, "bitsandbytes, bnb_4bit_quant_type: fp4"),
        ({**NF4, "bnb_4bit_quant_storage": "bfloat16"}, "bitsandbytes, bnb_4bit_quant_storage: bfloat16"),
    ],
    ids=str,
)
def test_other_forms_are_refused_by_their_names(folder: Path, given: Any, words: str) -> None:
    config = read_config(with_config(folder, given))
    told = rf"config.json: the weights are quantised already \(quantization_config: {words}\), and of such forms only"
    with pytest.raises(ModelError, match=told):
        check_whole(folder, config)
    with pytest.raises(ModelError, match=told):
        held_as(ModelSection(path="someone/model"), config)


def test_the_same_kind_may_be_asked_for_and_another_not(base: Path) -> None:
    section = ModelSection(path=str(base), dtype="float32")
    held = [load_base(section.model_copy(update={"quantization": kind})).model for kind in ("none", "nf4")]
    assert [kind_of(model) for model in held] == ["nf4", "nf4"]
    weights = [model.model.layers[0].mlp.down_proj.weight for model in held]
    assert torch.equal(weights[0].data, weights[1].data)
    with pytest.raises(ModelError, match=f"int8: the weights of {base} are in nf4 already; leave the key out"):
        load_base(section.model_copy(update={"quantization": "int8"}))


def test_the_files_say_which_layers_are_quantised(base: Path, tmp_path: Path) -> None:
    """Whatever config.json names: older transformers read `llm_int8_skip_modules` in another way."""
    folder = tmp_path / "other"
    folder.mkdir()
    for file in base.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    with_config(folder, NF4 | {"llm_int8_skip_modules": ["down_proj"]})
    layer = load_base(ModelSection(path=str(folder), dtype="float32")).model.model.layers[1]
    kinds = [type(one).__name__ for one in (layer.mlp.down_proj, layer.self_attn.o_proj, layer.self_attn.q_proj)]
    assert kinds == ["Linear4bit", "Linear", "Linear4bit"]


def test_a_config_that_says_more_than_the_files_is_refused(folder: Path) -> None:
    with pytest.raises(ModelError, match=r"says that the weights are quantised .*, and no tensor of the 15 is"):
        check_whole(folder, read_config(with_config(folder, NF4)))


def test_a_quantised_head_is_refused(tmp_path: Path) -> None:
    folder = nf4_checkpoint(tmp_path / "base", "phi3", llm_int8_skip_modules=[])
    with pytest.raises(ModelError, match="only the decoder's linear layers can be quantised; these are, too:\nlm_head"):
        check_whole(folder, read_config(folder))


def test_a_file_without_its_config_is_named(base: Path, folder: Path) -> None:
    save_file(load_file(base / "model.safetensors"), folder / "model.safetensors")
    with pytest.raises(ModelError, match=r"config\.json does not say so or the form is not nf4"):
        check_whole(folder, read_config(folder))


def test_without_bitsandbytes_the_extra_is_named(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prequantized, "find_spec", lambda name: None)
    for door in (load_base, open_base):
        with pytest.raises(ModelError, match=r"in nf4, and that needs bitsandbytes; pip install 'phinetune\[quant\]'"):
            door(ModelSection(path=str(base)))


def test_a_model_in_memory_says_the_same_of_itself(base: Path) -> None:
    config = load_base(ModelSection(path=str(base), dtype="float32")).model.config
    assert own_form(config, "here") == "nf4"
    names = ("model.layers.0.self_attn.o_proj", "model.layers.0.self_attn.q_proj", "lm_head")
    assert [is_held_so(name, config) for name in names] == [is_held_so(name, read_config(base)) for name in names]
    assert [is_held_so(name, config) for name in names] == [False, True, False]


@pytest.mark.parametrize(
    ("peft", "words"),
    [
        ({"init_lora_weights": "pissa"}, "`pissa` computes with the base's own weights, and nf4 rounds them"),
        ({"modules_to_save": ["down_proj"]}, r"modules_to_save: .*layers.0.mlp.down_proj is held as nf4"),
    ],
)
def test_what_only_a_16_bit_base_can_do_is_refused(
    base: Path, chats: Path, tmp_path: Path, peft: dict[str, Any], words: str
) -> None:
    config = tiny_config(chats, tmp_path / "run")
    config.model = ModelSection(path=str(base), dtype="float32")
    config.peft_config |= {"target_modules": ["q_proj"], **peft}
    with pytest.raises(ConfigError, match=words):
        prepare_run(settle(config))
    config.peft_config |= {"init_lora_weights": True, "modules_to_save": ["o_proj"]}
    prepare_run(settle(config))  # that one is in 16 bits


def test_onnx_does_not_take_the_packed_files(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="--to onnx does not read these; give the 16-bit checkpoint"):
        _folder_for_builder(str(base), tmp_path, "int4")
