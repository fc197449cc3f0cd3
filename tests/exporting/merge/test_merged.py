"""The merged view: PEFT's own merge, rounded once; tied embeddings; one shard in memory; what is refused."""

from __future__ import annotations

import json
import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.utils.integrations import dequantize_module_weight
from safetensors.torch import load_file, save_file
from torch import Tensor

from exporting.merge.merge_helpers import adapted, logits, open_plain, save_base
from helpers import TINY
from phinetune.checkpoints.load import load_base
from phinetune.checkpoints.opened import open_model
from phinetune.checkpoints.target_modules import linear_layers
from phinetune.config.model import ModelSection
from phinetune.config.run import dump_config, make_config
from phinetune.errors import ModelError
from phinetune.exporting.merge import weight_deltas as deltas_module
from phinetune.exporting.merge import weights as weights_module
from phinetune.exporting.merge.merge import merge_run
from phinetune.exporting.merge.merged import MergedCheckpoint, open_merged
from phinetune.run_folder import MARK

HEAD, EMBED = "lm_head.weight", "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base") / "tied", tie_word_embeddings=True)


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    adapted(base, tmp_path / "adapter")
    return tmp_path / "adapter"


def state(merged: MergedCheckpoint) -> dict[str, Tensor]:
    return {name: merged.tensor(name) for name in merged.names()}


def refused(folder: Path, **options: Any) -> str:
    with pytest.raises(ModelError) as caught:
        open_merged(folder, **options)
    return str(caught.value)


# -- numbers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"qkv_proj": 2, r"^model\.layers\.1\.mlp": 6}, "alpha_pattern": {"o_proj": 3}},
        {"rank_pattern": {"o_proj": 16}, "use_rslora": True, "alpha_pattern": {"qkv_proj": 5}},
        {"layers_to_transform": [1], "target_modules": ["qkv_proj", "down_proj"]},
        {"target_modules": ["embed_tokens", "lm_head", "o_proj"]},
        {"modules_to_save": ["norm"]},
        {"modules_to_save": ["lm_head", "embed_tokens"]},
        {"use_dora": True},
        {"use_dora": True, "target_modules": ["embed_tokens", "qkv_proj"], "use_rslora": True},
    ],
    ids=lambda options: ",".join(options) or "defaults",
)
def test_in_float32_it_is_pefts_own_merge(base: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    model = adapted(base, tmp_path / "adapter", **options)
    merged = state(open_merged(tmp_path / "adapter"))
    before = open_plain(base).state_dict()
    wanted = model.merge_and_unload().state_dict()
    assert merged.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(merged[name], tensor, rtol=1e-6, atol=1e-6)
    changed = {name for name in wanted if not torch.equal(wanted[name], before[name])}
    assert changed == set(open_merged(tmp_path / "adapter").changed())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32 adapter", "bfloat16 adapter"])
def test_in_bfloat16_the_float32_sum_is_rounded_once(tmp_path: Path, dtype: torch.dtype) -> None:
    base = save_base(tmp_path / "base", dtype="bfloat16")
    model = adapted(base, tmp_path / "adapter", dtype=dtype, use_rslora=True)
    weights = {name: layer.weight.detach().clone() for name, layer in linear_layers(open_plain(base)).items()}
    merged = open_merged(tmp_path / "adapter")
    assert merged.config.dtype == torch.bfloat16
    unlike = 0
    for name, layer in model.get_base_model().named_modules():
        if not hasattr(layer, "lora_A"):
            continue
        a, b = layer.lora_A["default"].weight.float(), layer.lora_B["default"].weight.float()
        once = (weights[name].float() + (b @ a) * layer.scaling["default"]).to(torch.bfloat16)
        assert torch.equal(merged.tensor(f"{name}.weight"), once)
        layer.merge()
        unlike += int((layer.base_layer.weight != once).sum())
    assert unlike > 0 or dtype == torch.float32  # PEFT rounds the product of a bfloat16 adapter, too


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["embed_tokens", "qkv_proj", "down_proj"]},
        {"target_modules": ["embed_tokens", "qkv_proj", "down_proj"], "use_dora": True},
    ],
    ids=["lora", "dora"],
)
def test_block_by_block_is_all_at_once(
    base: Path, tmp_path: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    adapted(base, tmp_path / "adapter", **options)
    merged = open_merged(tmp_path / "adapter")
    wanted = state(merged)
    monkeypatch.setattr(deltas_module, "BLOCK", 7 * 32)  # seven rows, or three: the last block is a smaller one
    for name, tensor in state(merged).items():
        torch.testing.assert_close(tensor, wanted[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", torch.float32], ids=str)
def test_another_dtype_is_a_rounding_of_the_float32_merge(adapter: Path, dtype: Any) -> None:
    exact, merged = open_merged(adapter), open_merged(adapter, dtype=dtype)
    assert merged.config.dtype == getattr(torch, str(dtype).removeprefix("torch."))
    for name in exact.names():
        assert torch.equal(merged.tensor(name), exact.tensor(name).to(merged.config.dtype))
        assert merged.dtype_of(name) == merged.tensor(name).dtype
        assert merged.bytes_of(name) == merged.tensor(name).nbytes


# -- tied embeddings -------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize(
    ("options", "stays_tied"),
    [
        ({}, True),
        ({"modules_to_save": ["norm"]}, True),
        ({"modules_to_save": ["lm_head"]}, False),
        ({"modules_to_save": ["embed_tokens"]}, False),
        ({"modules_to_save": ["embed_tokens", "lm_head"]}, False),
        ({"target_modules": ["qkv_proj", "lm_head"]}, False),
        ({"target_modules": ["qkv_proj", "embed_tokens"]}, False),
        ({"target_modules": ["qkv_proj", "embed_tokens"], "ensure_weight_tying": True}, True),
        ({"target_modules": ["qkv_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, True),
    ],
    ids=[
        "linear layers",
        "norm saved",
        "head saved",
        "embedding saved",
        "both saved",
        "head",
        "embedding",
        "embedding, tied",
        "embedding saved, tied",
    ],
)
def test_tied_embeddings_are_untied_where_the_adapter_demands_it(
    tied: Path, tmp_path: Path, options: dict[str, Any], stays_tied: bool
) -> None:
    model = adapted(tied, tmp_path / "adapter", **options)
    merged = open_merged(tmp_path / "adapter")
    assert merged.config.tie_word_embeddings is stays_tied
    assert merged.untied is not stays_tied
    assert (HEAD in merged.names()) is not stays_tied
    merge_run(tmp_path / "adapter", tmp_path / "out")
    written = open_plain(tmp_path / "out")
    assert (written.lm_head.weight is written.model.embed_tokens.weight) is stays_tied
    torch.testing.assert_close(logits(written), logits(model), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(logits(written), logits(open_plain(tied)), atol=1e-2)


@pytest.mark.parametrize("same", [True, False], ids=["the same", "different"])
def test_files_that_hold_both_of_a_tied_pair_decide_as_in_transformers(tied: Path, tmp_path: Path, same: bool) -> None:
    model = open_plain(tied)
    tensors = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    tensors[HEAD] += float(not same)
    model.save_pretrained(tmp_path / "base")
    save_file(tensors, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    for file in [*tied.glob("*token*"), tied / "chat_template.jinja"]:
        shutil.copy(file, tmp_path / "base")
    live = adapted(tmp_path / "base", tmp_path / "adapter")
    merged = open_merged(tmp_path / "adapter")
    assert merged.config.tie_word_embeddings is same
    assert (HEAD in merged.names()) is not same
    merge_run(tmp_path / "adapter", tmp_path / "out")
    torch.testing.assert_close(logits(open_plain(tmp_path / "out")), logits(live), rtol=1e-5, atol=1e-5)


def test_a_copy_of_the_embedding_that_peft_saved_is_no_obstacle(base: Path, tmp_path: Path) -> None:
    model = adapted(base, tmp_path / "adapter", target_modules=["embed_tokens", "lm_head"])
    model.save_pretrained(str(tmp_path / "adapter"), save_embedding_layers=True)
    assert any("base_layer" in name for name in load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
    merged = open_merged(tmp_path / "adapter")
    wanted = model.merge_and_unload().state_dict()
    for name in (EMBED, HEAD):
        torch.testing.assert_close(merged.tensor(name), wanted[name], rtol=1e-6, atol=1e-6)


# -- order and memory ------------------------------------------------------------------------------------------


def test_the_order_is_that_of_the_bases_files(base: Path, adapter: Path) -> None:
    files = sorted(base.glob("model-*.safetensors"))
    assert len(files) > 2
    index = json.loads((base / "model.safetensors.index.json").read_text())["weight_map"]
    places = [index[name] for name in open_merged(adapter).names()]
    assert places == sorted(places)
    assert set(places) == {file.name for file in files}


def test_one_shard_at_a_time_is_alive(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    merged = open_merged(adapter)
    limit = 30_000
    made: list[weakref.ref[Tensor]] = []
    alive: list[int] = []
    honest = MergedCheckpoint.tensor

    def tensor(self: MergedCheckpoint, name: str) -> Tensor:
        alive.append(sum(one() is not None for one in made))
        new = honest(self, name)
        made.append(weakref.ref(new))
        return new

    monkeypatch.setattr(MergedCheckpoint, "tensor", tensor)
    seen: list[str] = []
    for shard in merged.shards(limit):  # while the next is made, `shard` is still the last
        assert len(shard) == 1 or sum(one.nbytes for one in shard.values()) <= limit
        seen += shard
    assert seen == merged.names()
    assert alive == [i for names in merged.plan(limit) for i in range(len(names))]
    assert len(merged.plan(limit)) > 4


def test_opening_reads_no_weights(base: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    honest = weights_module.FolderWeights.get
    monkeypatch.setattr(weights_module.FolderWeights, "get", lambda self, name: read.append(name) or honest(self, name))
    merged = open_merged(adapter)
    merged.plan()
    assert read == []
    merged.tensor("model.norm.weight")
    assert read == ["model.norm.weight"]
    with pytest.raises(KeyError):
        merged.tensor("model.norm.bias")


# -- what can be opened ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [".", "checkpoint-2"], ids=["run", "checkpoint"])
def test_a_run_and_its_checkpoint_are_opened_on_a_random_base(tiny_run: Path, name: str) -> None:
    merged = open_merged(tiny_run / name, dtype="float32")
    assert merged.folder is None
    assert merged.base.path == TINY
    assert merged.adapter.r == 4
    assert merged.tokenizer.chat_template
    tuned = open_model(tiny_run / name, device="cpu", dtype="float32")
    wanted = tuned.model.merge_and_unload()
    for key, tensor in wanted.state_dict().items():
        torch.testing.assert_close(merged.tensor(key), tensor, rtol=1e-6, atol=1e-6)
    stops = tuned.loaded.model.generation_config.eos_token_id
    assert merged.generation_config.eos_token_id == stops


def test_a_checkpoint_has_its_own_weights(tiny_run: Path) -> None:
    last, first = open_merged(tiny_run), open_merged(tiny_run / "checkpoint-2")
    name = "model.layers.0.self_attn.qkv_proj.weight"
    assert not torch.equal(last.tensor(name), first.tensor(name))


def test_the_stop_ids_are_those_of_a_loaded_base(base: Path, adapter: Path) -> None:
    (base / "generation_config.json").rename(base / "kept")
    try:
        without = open_merged(adapter).generation_config.eos_token_id
        assert without == load_base(ModelSection(path=str(base))).model.generation_config.eos_token_id
    finally:
        (base / "kept").rename(base / "generation_config.json")
    assert set(without) == set(open_merged(adapter).generation_config.eos_token_id) - {260}  # <|assistant|>, declared


def test_another_tools_adapter_has_its_bases_name_alone(base: Path, adapter: Path) -> None:
    (adapter / "base.json").unlink()
    assert open_merged(adapter).folder == base


# -- the quantised base ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_the_quantised_base_is_what_the_run_trained_on(base: Path, tmp_path: Path, kind: str) -> None:
    pytest.importorskip("bitsandbytes")
    adapter = tmp_path / "adapter"
    adapted(base, adapter, target_modules=["o_proj"])
    section = {"path": str(base), "quantization": kind, "dtype": "bfloat16", "device": "cpu"}
    _as_run(adapter, section)
    loaded = load_base(ModelSection.model_validate(section), fast=False).model
    merged = open_merged(adapter, base="quantized", dtype="float32")
    assert merged.base_weights == kind
    layers = linear_layers(loaded)
    assert len(layers) == 8
    for name, layer in layers.items():
        wanted = dequantize_module_weight(layer).float()
        if "o_proj" not in name:
            assert torch.equal(merged.tensor(f"{name}.weight"), wanted)
            continue
        pair = load_file(adapter / "adapter_model.safetensors")
        a, b = (pair[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
        assert torch.equal(merged.tensor(f"{name}.weight"), b @ a * 2 + wanted)
    unquantised = open_merged(adapter, dtype="float32")
    assert torch.equal(unquantised.tensor(HEAD), merged.tensor(HEAD))
    assert torch.equal(unquantised.tensor("model.norm.weight"), merged.tensor("model.norm.weight"))
    assert not torch.equal(unquantised.tensor(f"{name}.weight"), merged.tensor(f"{name}.weight"))


def _as_run(adapter: Path, section: dict[str, Any]) -> None:
    (adapter / "config.yaml").write_text(MARK + dump_config(make_config({"model": section})))


@pytest.mark.parametrize("name", [".", "checkpoint-2"], ids=["run", "checkpoint"])
def test_a_base_that_was_not_quantised_has_no_quantised_weights(tiny_run: Path, name: str) -> None:
    assert "was not quantised in training" in refused(tiny_run / name, base="quantized")


def test_the_base_of_another_tools_adapter_is_quantised_to_nf4(adapter: Path) -> None:
    """Another tool records no quantisation."""
    pytest.importorskip("bitsandbytes")
    assert open_merged(adapter, base="quantized").base_weights == "nf4"


def test_another_kind_of_base_is_refused(adapter: Path) -> None:
    assert "base `4bit`: an adapter is merged into" in refused(adapter, base="4bit")


def test_without_bitsandbytes_the_extra_is_named(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights_module, "find_spec", lambda name: None)
    assert "pip install 'phinetune[quant]'" in refused(adapter, base="quantized")


# -- what is refused -------------------------------------------------------------------------------------------


def test_another_base_is_refused(adapter: Path, tmp_path: Path) -> None:
    other = save_base(tmp_path / "other", initializer_range=0.5)
    record = json.loads((adapter / "base.json").read_text())
    (adapter / "base.json").write_text(json.dumps({**record, "path": str(other)}))
    assert "another model; load the adapter on the base it was trained on" in refused(adapter)


def test_a_second_merge_is_refused(base: Path, adapter: Path, tmp_path: Path) -> None:
    merge_run(adapter, tmp_path / "out")
    assert refused(tmp_path / "out") == f"{tmp_path / 'out'}: already merged: no adapter there"
    # The same adapter on the merged model: by the base's fingerprint, and by the adapter's own where none is recorded.
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(
        json.dumps({**config, "base_model_name_or_path": str(tmp_path / "out")})
    )
    record = json.loads((adapter / "base.json").read_text())
    (adapter / "base.json").write_text(json.dumps({**record, "path": str(tmp_path / "out")}))
    assert "another model" in refused(adapter)
    (adapter / "base.json").unlink()
    assert "is the base with this adapter already in it" in refused(adapter)
    # Another adapter, trained on the merged model, may be merged.
    adapted(tmp_path / "out", tmp_path / "second", r=2)
    assert open_merged(tmp_path / "second").folder == tmp_path / "out"
    (tmp_path / "out" / "merged.json").write_text("{}")
    assert "merged.json: broken" in refused(tmp_path / "second")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lora_bias": True}, "`lora_bias` is set: Phi-3's layers have no bias"),
        ({"trainable_token_indices": [1, 2]}, "`trainable_token_indices` is set"),
        ({"target_parameters": ["qkv_proj.weight"]}, "`target_parameters` is set"),
        ({"init_lora_weights": "pissa"}, "changed the base's weights"),
        ({"init_lora_weights": "olora"}, "changed the base's weights"),
    ],
    ids=["lora_bias", "tokens", "parameters", "pissa", "olora"],
)
def test_what_a_weight_cannot_hold_is_refused(adapter: Path, options: dict[str, Any], words: str) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **options}))
    assert words in refused(adapter)


def test_an_adapter_that_does_not_fit_is_refused_with_every_tensor(adapter: Path) -> None:
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    names = list(tensors)
    del tensors[names[0]]
    tensors[names[1]] = torch.ones(3, 3)
    tensors["base_model.model.lm_head.weight"] = torch.ones(2, 2)
    save_file(tensors, file)
    text = refused(adapter)
    for words in (f"missing: {names[0]}", f"{names[1]}: adapter shape (3, 3)", "unexpected: base_model.model.lm_head"):
        assert words in text


def test_a_damaged_adapter_is_refused(adapter: Path) -> None:
    (adapter / "adapter_model.safetensors").write_bytes(b"no tensors")
    assert "adapter_model.safetensors: damaged" in refused(adapter)


def test_split_names_are_told_the_way(adapter: Path) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "target_modules": ["q_proj", "v_proj"]}))
    assert "--to peft-fused" in refused(adapter)


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("none", "none: no such folder"),
        ("model", "a model, not an adapter"),
        ("empty", "no adapter there (adapter_config.json)"),
    ],
)
def test_a_place_without_an_adapter_is_refused(base: Path, tmp_path: Path, place: str, words: str) -> None:
    (tmp_path / "model").symlink_to(base)
    (tmp_path / "empty").mkdir()
    assert words in refused(tmp_path / place)


def test_a_dtype_that_is_none_is_refused(adapter: Path) -> None:
    assert "dtype `int8`: a merged model is written in float32, bfloat16, float16" in refused(adapter, dtype="int8")


@pytest.fixture
def loose(tmp_path: Path) -> Path:
    """A folder with `base`, in one file, and an `adapter` that has no record of it: the base's weights may change."""
    save_base(tmp_path / "base", shards="1GB")
    adapted(tmp_path / "base", tmp_path / "adapter", target_modules=["o_proj"])
    (tmp_path / "adapter" / "base.json").unlink()
    return tmp_path


def test_weights_that_do_not_fit_their_configuration_are_refused(loose: Path) -> None:
    file = loose / "base" / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.norm.weight"]
    tensors["model.layers.0.input_layernorm.weight"] = torch.ones(5)
    save_file(tensors, file)
    text = refused(loose / "adapter")
    assert "missing: model.norm.weight" in text
    assert "model.layers.0.input_layernorm.weight: shape (5,) does not match" in text


def test_weights_of_an_integer_dtype_are_refused(loose: Path) -> None:
    file = loose / "base" / "model.safetensors"
    save_file({**load_file(file), "model.norm.weight": torch.ones(32, dtype=torch.int8)}, file)
    assert "model.norm.weight is I8; weights of F32" in refused(loose / "adapter")


@pytest.mark.parametrize(
    ("file", "name", "value", "weight", "dtype", "words"),
    [
        (
            "base/model",
            "model.norm.weight",
            torch.nan,
            "model.norm.weight",
            "float32",
            "the weights of {folder}/base hold values that are not finite",
        ),
        (
            "adapter/adapter_model",
            "base_model.model.model.layers.0.self_attn.o_proj.lora_A.weight",
            -torch.inf,
            "model.layers.0.self_attn.o_proj.weight",
            "bfloat16",
            "with the adapter in {folder}/adapter it holds values that are not finite",
        ),
        (
            "base/model",
            "model.layers.1.mlp.down_proj.weight",
            7e4,
            "model.layers.1.mlp.down_proj.weight",
            "float16",
            "it holds values that are too large for float16; merge with --dtype bfloat16 or float32",
        ),
    ],
    ids=["base", "adapter", "float16"],
)
def test_values_that_are_not_finite_are_named(
    loose: Path, file: str, name: str, value: float, weight: str, dtype: str, words: str
) -> None:
    path = loose / f"{file}.safetensors"
    tensors = load_file(path)
    tensors[name].flatten()[3] = value
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ModelError) as caught:
        open_merged(loose / "adapter", dtype=dtype).tensor(weight)
    assert str(caught.value) == f"{weight}: {words.format(folder=loose)}"


def test_a_value_that_is_too_large_for_float16_fits_bfloat16(loose: Path) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    path = loose / "base" / "model.safetensors"
    tensors = load_file(path)
    tensors[name][0, 0] = 7e4
    save_file(tensors, path, metadata={"format": "pt"})
    assert open_merged(loose / "adapter", dtype="bfloat16").tensor(name).isfinite().all()
