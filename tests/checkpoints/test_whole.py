"""A checkpoint that is not whole is refused before a weight is loaded, and the sentence says what it is instead."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from helpers import chat, tiny_config, write_jsonl
from phinetune.checkpoints.load import Loaded, load_base, read_config
from phinetune.checkpoints.opened import open_model
from phinetune.checkpoints.whole import REMEDY, SHOWN, check_whole
from phinetune.config.model import ModelSection
from phinetune.errors import ModelError
from phinetune.exporting.base_files import open_base
from phinetune.training.prepare import prepare_run, settle

Tensors = dict[str, Tensor]
DOWN = "model.layers.1.mlp.down_proj.weight"
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def rewrite(folder: Path, change: Callable[[Tensors], Tensors]) -> None:
    file = folder / "model.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in change(load_file(file)).items()}, file)


def without(*names: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if name not in names}


def plus(**more: Tensor) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {**tensors, **{name.replace("__", "."): tensor for name, tensor in more.items()}}


def renamed(change: Callable[[str], str]) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {change(name): tensor for name, tensor in tensors.items()}


def edit_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def refusal(folder: Path) -> str:
    with pytest.raises(ModelError) as caught:
        check_whole(folder, read_config(folder))
    return str(caught.value)


def test_a_whole_checkpoint_passes(folder: Path) -> None:
    check_whole(folder, read_config(folder))
    rewrite(folder, plus(model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(4)))
    check_whole(folder, read_config(folder))


def test_every_door_refuses_a_base_that_lacks_a_tensor(folder: Path, tmp_path: Path) -> None:
    rewrite(folder, without(DOWN))
    section = ModelSection(path=str(folder))
    config = tiny_config(write_jsonl(tmp_path / "chats.jsonl", [chat("Hi", "Hello")] * 4), tmp_path / "run")
    config.model = section
    doors: dict[str, Callable[[], object]] = {
        "load": lambda: load_base(section),
        "nf4": lambda: load_base(section.model_copy(update={"quantization": "nf4"})),
        "open": lambda: open_model(folder),
        "export": lambda: open_base(section),
        "prepare": lambda: prepare_run(settle(config)),
    }
    for door in doors.values():
        with pytest.raises(ModelError, match=f"don't fit its config.json:\nmissing: {DOWN}\n"):
            door()


def test_all_that_is_wrong_is_named_at_once(folder: Path) -> None:
    rewrite(folder, without(DOWN, "model.norm.weight"))
    rewrite(folder, plus(score__weight=torch.zeros(2, 32), model__layers__0__input_layernorm__weight=torch.zeros(3)))
    rewrite(folder, plus(model__layers__1__input_layernorm__weight=torch.zeros(32, dtype=torch.int8)))
    assert refusal(folder).splitlines() == [
        f"{folder}: the weights don't fit its config.json:",
        f"missing: {DOWN}",
        "missing: model.norm.weight",
        "unexpected: score.weight",
        "model.layers.0.input_layernorm.weight: shape (3,) does not match the configuration's (32,)",
        "model.layers.1.input_layernorm.weight is I8; weights of F32, BF16, F16, F64 can be read",
        REMEDY,
    ]


def test_of_many_tensors_some_are_named_and_all_counted(folder: Path) -> None:
    rewrite(folder, lambda tensors: {f"x{i}": torch.zeros(1) for i in range(SHOWN + 3)})
    text = refusal(folder)
    assert text.count("missing: ") == text.count("unexpected: x") == SHOWN
    assert "… and 3 more of this kind" in text
    assert "layers" not in text.replace("model.layers.", "")


def split_form(tensors: Tensors) -> Tensors:
    """The tensors as Llama names them."""
    made: Tensors = {}
    for name, tensor in tensors.items():
        if "qkv_proj" in name:
            parts = zip(("q_proj", "k_proj", "v_proj"), tensor.split([32, 16, 16]), strict=True)
            made |= {name.replace("qkv_proj", part): piece for part, piece in parts}
        elif "gate_up_proj" in name:
            parts = zip(("gate_proj", "up_proj"), tensor.chunk(2), strict=True)
            made |= {name.replace("gate_up_proj", part): piece for part, piece in parts}
        else:
            made[name] = tensor
    return made


def quantised(*ends: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {**tensors, **{f"{DOWN.removesuffix('weight')}{end}": torch.zeros(1) for end in ends}}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (split_form, "the weights are in Llama's or Mistral's form, and config.json says phi3"),
        (renamed(lambda name: f"module.{name}"), "`module.`: the model was saved inside DistributedDataParallel"),
        (renamed(lambda name: f"_orig_mod.{name}"), "`_orig_mod.`: the model was saved inside torch.compile"),
        (renamed(lambda name: f"base_model.model.{name}"), "`base_model.model.`: the model was saved inside PEFT"),
        (renamed(lambda name: f"language_model.{name}"), "inside a model of several modalities"),
        (renamed(lambda name: f"policy.{name}"), "`policy.`: the model was saved inside another module"),
        (renamed(lambda name: name.removeprefix("model.")), "the names lack `model.`"),
        (quantised("weight.absmax", "weight.quant_state.bitsandbytes__nf4"), "quantised by bitsandbytes already"),
        (quantised("SCB"), "quantised by bitsandbytes already"),
        (quantised("qweight", "qzeros"), "GPTQ's or AWQ's form"),
        (quantised("weight_scale_inv"), "FP8"),
    ],
)
def test_another_form_of_the_model_is_named(folder: Path, change: Callable[[Tensors], Tensors], words: str) -> None:
    rewrite(folder, change)
    text = refusal(folder)
    assert words in text
    assert REMEDY not in text


def test_an_adapter_saved_with_its_base_is_named(folder: Path, tiny: Loaded) -> None:
    """The state dict of PEFT's model itself, as `torch.save(model.state_dict())` users write it."""
    model = get_peft_model(tiny.model, LoraConfig(r=2, target_modules=["qkv_proj"]))
    rewrite(folder, lambda _: {name: tensor.clone() for name, tensor in model.state_dict().items()})
    text = refusal(folder)
    assert "merge_and_unload" in text
    assert "LoRA tensors lie among the weights" in text
    assert "`base_model.model.`" in text


def test_sizes_that_differ_from_the_configuration_are_explained(folder: Path) -> None:
    rewrite(folder, plus(model__embed_tokens__weight=torch.zeros(310, 32), lm_head__weight=torch.zeros(310, 32)))
    assert "the vocabulary has 310 rows here, and config.json says vocab_size: 300" in refusal(folder)
    edit_config(folder, vocab_size=310, num_hidden_layers=3)
    assert "the files hold 2 layers, and config.json says num_hidden_layers: 3" in refusal(folder)
    edit_config(folder, num_hidden_layers=2)
    check_whole(folder, read_config(folder))
    rewrite(folder, plus(model__embed_tokens__weight=torch.zeros(310, 16), lm_head__weight=torch.tensor(0.0)))
    assert "vocabulary" not in refusal(folder)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("kept", [EMBED, HEAD])
def test_of_a_tied_pair_one_is_enough(folder: Path, kept: str, quantization: Any) -> None:
    edit_config(folder, tie_word_embeddings=True)
    rewrite(folder, without(HEAD if kept == EMBED else EMBED))
    wanted = load_file(folder / "model.safetensors")[kept]
    model = load_base(ModelSection(path=str(folder), quantization=quantization)).model
    assert torch.equal(model.lm_head.weight, wanted)
    assert torch.equal(model.model.embed_tokens.weight, wanted)
    rewrite(folder, without(kept))
    assert f"missing: {EMBED}" in refusal(folder)


def test_a_head_that_is_not_tied_may_not_be_missing(folder: Path) -> None:
    rewrite(folder, without(HEAD))
    assert f"missing: {HEAD}" in refusal(folder)


@pytest.mark.parametrize("wrong", [{"num_attention_heads": 0}, {"pad_token_id": 4000}, {"hidden_act": "swish9"}])
def test_a_configuration_that_makes_no_model_is_refused(folder: Path, wrong: dict[str, Any]) -> None:
    edit_config(folder, **wrong)
    with pytest.raises(ModelError, match=r"config\.json: "):
        check_whole(folder, read_config(folder))


@pytest.mark.parametrize(("value", "dtype"), [(float("nan"), "float32"), (float("inf"), "bfloat16")])
def test_every_door_refuses_weights_that_are_no_numbers(folder: Path, value: float, dtype: str) -> None:
    def spoil(tensors: Tensors) -> Tensors:
        tensors[DOWN][3, 5] = value
        return tensors

    rewrite(folder, spoil)
    for door in (load_base, lambda section: open_model(section.path, dtype=section.dtype)):
        with pytest.raises(ModelError) as caught:
            door(ModelSection(path=str(folder), dtype=dtype))  # type: ignore[operator]
        assert f"{DOWN}: 1 of 2,048 values are not finite" in str(caught.value)


def test_weights_that_a_narrower_dtype_can_not_hold_are_told(folder: Path) -> None:
    rewrite(folder, lambda tensors: {**tensors, DOWN: tensors[DOWN] + 1e5})
    load_base(ModelSection(path=str(folder), dtype="float32"))
    with pytest.raises(ModelError, match="float16 is too narrow for them"):
        load_base(ModelSection(path=str(folder), dtype="float16"))


def test_a_sum_that_overflows_is_no_fault(folder: Path) -> None:
    rewrite(folder, lambda tensors: {**tensors, DOWN: torch.full_like(tensors[DOWN], 3e38)})
    load_base(ModelSection(path=str(folder), dtype="float32"))
