"""Checkpoints of the family load as the hub has them; everything else is refused in a sentence."""

from __future__ import annotations

import copy
import gc
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers import SHARED, TINY
from phinetune.checkpoints import answer_weights
from phinetune.checkpoints import device as device_module
from phinetune.checkpoints.answer_weights import check_q8
from phinetune.checkpoints.device import pick_device, pick_dtype
from phinetune.checkpoints.load import Loaded, load_base, read_config
from phinetune.config.model import ModelSection
from phinetune.engine.kernels.native import operator
from phinetune.engine.kernels.q8 import quantize
from phinetune.engine.q8_linear import Q8Linear
from phinetune.errors import ConfigError, ModelError


def edit_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def refusal(folder: Path | str, **section: Any) -> str:
    with pytest.raises(ModelError) as caught:
        load_base(ModelSection(path=str(folder), **section))
    return str(caught.value)


def test_a_folder_loads_with_the_same_weights(folder: Path, tiny: Loaded) -> None:
    loaded = load_base(ModelSection(path=str(folder)))
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(loaded.model(ids).logits, tiny.model(ids).logits)
    assert (loaded.base.path, loaded.base.revision) == (str(folder), None)
    assert not loaded.model.training


def test_sections_reach_the_model(folder: Path) -> None:
    section = ModelSection(path=str(folder), dtype="bfloat16", attn_implementation="eager", use_cache=False)
    model = load_base(section).model
    assert (model.dtype, model.config._attn_implementation) == (torch.bfloat16, "eager")
    assert model.config.use_cache is model.generation_config.use_cache is False


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"the hub's configurations are not at {SHARED}")
@pytest.mark.parametrize("name", ["phi-3-mini-4k-instruct", "phi-3.5-mini-instruct", "phi-4-mini-instruct"])
def test_hub_configurations_load_shrunk(name: str, tmp_path: Path, tiny: Loaded) -> None:
    """`auto_map` names code that is not there: were it run, this would fail."""
    hub = json.loads((SHARED / "hub-configs" / f"{name}.json").read_text())
    hub |= {"num_hidden_layers": 1, "intermediate_size": 32, "vocab_size": 300, "pad_token_id": 259}
    hub |= {"bos_token_id": 1, "eos_token_id": 259}
    (tmp_path / "config.json").write_text(json.dumps(hub))
    config = read_config(tmp_path)
    from transformers import Phi3ForCausalLM

    Phi3ForCausalLM(config).save_pretrained(tmp_path)
    edit_config(tmp_path, **hub)  # save_pretrained normalises; put the hub's own words back
    tiny.tokenizer.save_pretrained(tmp_path)
    loaded = load_base(ModelSection(path=str(tmp_path), dtype="float32"))
    assert loaded.model.config.sliding_window == hub["sliding_window"]
    assert loaded.model.config.num_key_value_heads == hub["num_key_value_heads"]
    rope = loaded.model.config.rope_parameters
    assert rope["rope_type"] == ("longrope" if hub["rope_scaling"] else "default")
    if hub["rope_scaling"]:
        assert rope["long_factor"] == hub["rope_scaling"]["long_factor"]
    assert torch.isfinite(loaded.model(torch.tensor([[5, 6, 7]])).logits).all()


def test_the_legacy_rope_type_su_is_longrope(folder: Path) -> None:
    factors = [1.0] * 4
    scaling = {"type": "su", "short_factor": factors, "long_factor": [2.0] * 4}
    edit_config(folder, rope_scaling=scaling, rope_theta=10000.0, rope_parameters=None)
    config = load_base(ModelSection(path=str(folder))).model.config
    assert config.rope_parameters["rope_type"] == "longrope"
    assert config.rope_parameters["long_factor"] == [2.0] * 4


def kinds(model: Any) -> set[torch.dtype]:
    return {parameter.dtype for parameter in model.parameters()}


@pytest.fixture
def half_files(folder: Path, tiny: Loaded, monkeypatch: pytest.MonkeyPatch) -> ModelSection:
    """The tiny model in bfloat16, on a machine that reads such weights as they lie, whether or not this is one."""
    copy.deepcopy(tiny.model).bfloat16().save_pretrained(folder)
    monkeypatch.setattr(answer_weights.few_rows, "reads_half", lambda: True)
    return ModelSection(path=str(folder), dtype="float32", device="cpu")


def test_weights_of_bfloat16_files_stay_so_to_answer(half_files: ModelSection) -> None:
    half, whole = (load_base(half_files, weights=weights).model for weights in ("auto", None))
    assert (kinds(half), kinds(whole)) == ({torch.float32, torch.bfloat16}, {torch.float32})
    for name, parameter in whole.named_parameters():
        assert torch.equal(parameter, half.get_parameter(name).float())
    assert torch.equal(half.model.rotary_emb.original_inv_freq, whole.model.rotary_emb.original_inv_freq)


def test_where_a_weight_would_be_rounded_none_stays_in_half(half_files: ModelSection, tiny: Loaded) -> None:
    for kind in (torch.float16, torch.float32):
        copy.deepcopy(tiny.model).to(kind).save_pretrained(half_files.path)
        assert kinds(load_base(half_files, weights="auto").model) == {torch.float32}
    model: Any = copy.deepcopy(tiny.model).bfloat16()
    model.model.layers[1].mlp.down_proj.float()
    model.save_pretrained(half_files.path)
    assert kinds(load_base(half_files, weights="auto").model) == {torch.float32}


def test_other_products_and_other_processors_have_their_weights_as_ever(
    half_files: ModelSection, monkeypatch: pytest.MonkeyPatch
) -> None:
    for kind in ("bfloat16", "float16"):
        section = half_files.model_copy(update={"dtype": kind})
        assert kinds(load_base(section, weights="auto").model) == {getattr(torch, kind)}
    monkeypatch.setattr(answer_weights.few_rows, "reads_half", lambda: False)
    assert kinds(load_base(half_files, weights="auto").model) == {torch.float32}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("files", [torch.float32, torch.bfloat16, torch.float16])
def test_a_base_in_q8_0_is_rounded_once_from_what_the_files_hold(
    folder: Path, tiny: Loaded, dtype: str, files: torch.dtype
) -> None:
    copy.deepcopy(tiny.model).to(files).save_pretrained(folder)
    section = ModelSection(path=str(folder), dtype=dtype, device="cpu")  # type: ignore[arg-type]
    held = load_base(section, weights="q8_0").model
    whole = load_base(section.model_copy(update={"dtype": "float32"})).model
    assert kinds(held) == {torch.int8, getattr(torch, dtype)}
    for name, module in held.named_modules():
        if isinstance(module, Q8Linear):
            wanted = quantize(whole.get_parameter(f"{name}.weight"))
            assert all(map(torch.equal, (module.weight, module.scales), wanted))
    assert sum(isinstance(module, Q8Linear) for module in held.modules()) == 2 * 4 + 1


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux tells what is mapped")
def test_a_base_in_q8_0_lets_its_file_go(folder: Path, tiny: Loaded) -> None:
    copy.deepcopy(tiny.model).bfloat16().save_pretrained(folder)
    section = ModelSection(path=str(folder), dtype="bfloat16", device="cpu")
    model = load_base(section, weights="q8_0").model
    gc.collect()
    assert str(folder) not in Path("/proc/self/maps").read_text()
    assert model.dtype == torch.bfloat16


def test_weights_that_are_not_finite_are_told_before_they_are_rounded(folder: Path, tiny: Loaded) -> None:
    model: Any = copy.deepcopy(tiny.model)
    model.model.layers[1].mlp.down_proj.weight.data[3, 2] = torch.nan
    model.save_pretrained(folder)
    with pytest.raises(ModelError, match="down_proj"):
        load_base(ModelSection(path=str(folder)), weights="q8_0")


def test_a_machine_without_the_kernel_says_that_q8_0_takes_longer(
    tiny: Loaded, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(operator, "chosen", dict)
    load_base(ModelSection(path=TINY, dtype="float32", device="cpu"), weights="q8_0")
    assert "no kernel multiplies them as they lie with float32" in caplog.text


def test_what_cannot_lie_in_q8_0_is_told_at_once(folder: Path) -> None:
    edit_config(folder, hidden_act="gelu")
    section = ModelSection(path=str(folder), device="cpu", quantization="int8")
    with pytest.raises(ConfigError) as caught:
        load_base(section, weights="q8_0", fast=False)
    told = str(caught.value)
    for words in ("held in int8 already", "hidden_act `gelu`", "engine.kind is plain", "leave it out"):
        assert words in told
    with pytest.raises(ConfigError, match="q8_0 is for CPUs"):
        check_q8(ModelSection(path=TINY), torch.device("cuda"))


def test_stop_ids_that_a_checkpoint_forgot_are_added(folder: Path) -> None:
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 259, "pad_token_id": 259}))
    generation = load_base(ModelSection(path=str(folder))).model.generation_config
    assert generation.eos_token_id == [259, 262]  # <|endoftext|>, then the template's <|end|>


def test_past_the_sliding_window_sdpa_equals_eager() -> None:
    shape = "random:{layers: 2, hidden: 32, intermediate: 32, heads: 4, vocab: 300, sliding_window: 16}"
    ids = torch.randint(3, 259, (1, 50), generator=torch.Generator().manual_seed(0))
    logits = [
        load_base(ModelSection(path=shape, attn_implementation=attention)).model(ids).logits
        for attention in ("sdpa", "eager")
    ]
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-4, atol=1e-5)


def test_another_kind_of_model_is_refused(folder: Path) -> None:
    for other, words in {
        "gemma": "taken are phi3 (",
        "mixtral": "a mixture of experts; ms-swift, LLaMA-Factory and axolotl train these",
        "phimoe": "a mixture of experts",
        "phi3_v": "reads images (or sound); ms-swift and LLaMA-Factory train these",
        "phi": "Phi-1.5 or Phi-2",
    }.items():
        edit_config(folder, model_type=other)
        text = refusal(folder)
        assert f"model_type is `{other}`; taken are phi3" in text
        assert words in text


def test_pickled_weights_are_refused(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "pickled (pytorch_model.bin)" in refusal(folder)


def test_missing_shards_are_named(folder: Path) -> None:
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    assert "1 of 2 weight files are missing: model-00002-of-00002.safetensors" in refusal(folder)


def test_a_folder_without_weights_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert "no weights there" in refusal(folder)


def test_a_tokenizer_without_template_is_refused_and_can_be_replaced(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "whole")
    (folder / "chat_template.jinja").unlink()
    assert "no chat template" in refusal(folder)
    loaded = load_base(ModelSection(path=str(folder), tokenizer=str(tmp_path / "whole")))
    assert loaded.tokenizer.chat_template


@pytest.mark.parametrize(
    ("path", "words"),
    [("no/such/folder/here", "no such folder"), ("nowhere/to-be-found", "could not be fetched from the hub")],
)
def test_a_path_that_is_not_there_is_refused(path: str, words: str) -> None:
    assert words in refusal(path)


def test_a_revision_is_for_hub_ids(folder: Path) -> None:
    assert "model.revision is for hub ids" in refusal(folder, revision="main")


def test_a_broken_config_is_named(folder: Path) -> None:
    (folder / "config.json").write_text("{")
    assert "config.json: broken JSON" in refusal(folder)
    (folder / "config.json").unlink()
    assert "no config.json there" in refusal(folder)


def test_random_models_are_told_apart_by_shape_and_seed() -> None:
    prints = [load_base(ModelSection(path=TINY, seed=seed)).base.fingerprint for seed in (0, 0, 1)]
    assert prints[0] == prints[1] != prints[2]


def test_a_tokenizer_without_pad_gets_a_reserved_token_and_none_is_added(folder: Path) -> None:
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    del settings["pad_token"]
    file.write_text(json.dumps(settings))
    tokenizer = load_base(ModelSection(path=str(folder))).tokenizer
    assert tokenizer.pad_token == "<unk>"
    assert len(tokenizer) <= 300


@pytest.mark.parametrize(("native", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_auto_dtype_follows_the_processor(monkeypatch: pytest.MonkeyPatch, native: bool, dtype: torch.dtype) -> None:
    monkeypatch.setattr(device_module, "has_native_bf16", lambda device: native)
    assert pick_dtype("auto", pick_device("cpu")) == dtype


def test_a_dtype_can_be_asked_for() -> None:
    assert pick_dtype("float16", pick_device("cpu")) == torch.float16


@pytest.mark.parametrize("name", ["gpu", "cuda:99"])
def test_a_device_that_is_not_there_is_refused(name: str) -> None:
    with pytest.raises(ModelError, match=f"`{name}`"):
        pick_device(name)
