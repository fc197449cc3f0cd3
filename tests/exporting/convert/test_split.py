"""Fused names to split ones and back: the split adapter on a model in Llama's form says what the fused one does."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from cli.cli_helpers import run
from exporting.convert.convert_helpers import randomise
from exporting.merge.merge_helpers import adapted, logits, open_plain, save_base
from phinetune.checkpoints.opened import open_model
from phinetune.errors import ModelError
from phinetune.exporting.convert import convert as module
from phinetune.exporting.convert.convert import convert

ALL = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
SPLIT = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ROWS = {"qkv_proj": {"q_proj": 32, "k_proj": 16, "v_proj": 16}, "gate_up_proj": {"gate_proj": 64, "up_proj": 64}}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(scope="module")
def forms(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one adapter in the forms `fused` and `split`, and with the tensors of both in `both`. Read only."""
    folder = tmp_path_factory.mktemp("forms")
    adapted(base, folder / "fused")
    convert(folder / "fused", folder / "split", "peft-split")
    shutil.copytree(folder / "fused", folder / "both")
    tensors = {**read(folder / "fused")[1], **read(folder / "split")[1]}
    save_file(tensors, folder / "both" / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


def llama_form(base: Path) -> LlamaForCausalLM:
    """The base with split layers: transformers' Llama with the same weights."""
    phi3 = open_plain(base)
    same = (
        "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
        "max_position_embeddings rms_norm_eps tie_word_embeddings"
    )
    config = LlamaConfig(**{name: getattr(phi3.config, name) for name in same.split()})
    state: dict[str, Tensor] = {}
    for name, tensor in phi3.state_dict().items():
        whole = next((whole for whole in ROWS if whole in name), None)
        if whole is None:
            state[name] = tensor
            continue
        for (part, _), rows in zip(ROWS[whole].items(), tensor.split(list(ROWS[whole].values())), strict=True):
            state[name.replace(whole, part)] = rows
    llama = LlamaForCausalLM(config)
    llama.load_state_dict(state)
    return llama.eval()


def on(model: Any, folder: Path) -> PeftModel:
    """The adapter of `folder` on `model` through PEFT, which warns of keys that are missing or left over."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        return PeftModel.from_pretrained(model, str(folder)).eval()


def read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    return json.loads((folder / "adapter_config.json").read_text()), load_file(folder / "adapter_model.safetensors")


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_the_llama_form_is_the_same_model(base: Path) -> None:
    close(logits(llama_form(base)), logits(open_plain(base)))


# -- fused to split --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"target_modules": ["qkv_proj", "down_proj"]},
        {"use_rslora": True},
        {"alpha_pattern": {"o_proj": 3, r"layers\.1\.mlp\.gate_up_proj": 5}},
        {"rank_pattern": {"o_proj": 2, r"^model\.layers\.1\.self_attn\.qkv_proj": 6}, "use_rslora": True},
        {"target_modules": ["gate_up_proj", "lm_head", "embed_tokens"]},
        {"layers_to_transform": [1], "target_modules": ALL},
    ],
    ids=lambda options: ",".join(options) or "defaults",
)
def test_the_split_adapter_on_split_layers_says_what_the_fused_one_does(
    base: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    fused = adapted(base, tmp_path / "fused", **options)
    done = convert(tmp_path / "fused", tmp_path / "split", "peft-split")
    close(logits(on(llama_form(base), tmp_path / "split")), logits(fused))
    assert not torch.allclose(logits(fused), logits(open_plain(base)), atol=1e-2)
    assert done.difference < 1e-6
    close(logits(as_vllm_reads(llama_form(base), tmp_path / "split")), logits(fused))
    convert(tmp_path / "split", tmp_path / "back", "peft-fused")
    close(logits(on(open_plain(base), tmp_path / "back")), logits(fused))


def as_vllm_reads(model: LlamaForCausalLM, folder: Path) -> LlamaForCausalLM:
    """One scale for the whole adapter, alpha / r (vLLM's PEFTHelper), patterns unread; ranks up to r."""
    config, tensors = read(folder)
    assert not config["use_rslora"]
    scale = config["lora_alpha"] / config["r"]
    with torch.no_grad():
        for name in [name for name in tensors if "lora_A" in name or "lora_embedding_A" in name]:
            b = tensors[name.replace("_A", "_B")]
            assert b.shape[1] <= config["r"]
            layer = model.get_submodule(name.removeprefix("base_model.model.").rpartition(".lora_")[0])
            update = scale * (b @ tensors[name])
            layer.weight += update.T if "embedding" in name else update
    return model


def test_a_is_shared_and_the_rows_of_b_are_cut_to_the_bit(base: Path, tmp_path: Path) -> None:
    adapted(base, tmp_path / "fused")
    done = convert(tmp_path / "fused", tmp_path / "split", "peft-split")
    assert done.kinds == dict.fromkeys([*SPLIT[:3], "o_proj", "gate_proj", "up_proj", "down_proj"], 2)
    (old, whole), (config, made) = read(tmp_path / "fused"), read(tmp_path / "split")
    assert len(made) == 2 * 2 * 7
    for name, tensor in whole.items():
        parts = next((parts for fused, parts in ROWS.items() if fused in name), None)
        if parts is None:
            assert torch.equal(made[name], tensor)
            continue
        fused = name.split(".")[-3]
        pieces = [made[name.replace(fused, part)] for part in parts]
        if "lora_A" in name:
            assert all(torch.equal(piece, tensor) for piece in pieces)
        else:
            assert [len(piece) for piece in pieces] == list(parts.values())
            assert torch.equal(torch.cat(pieces), tensor)
    assert set(config["target_modules"]) == set(SPLIT)
    kept = ("r", "lora_alpha", "base_model_name_or_path", "task_type", "peft_type", "bias")
    assert {key: config[key] for key in kept} == {key: old[key] for key in kept}
    assert config["base_model_name_or_path"] == str(base)
    assert not config["rank_pattern"]
    assert not config["alpha_pattern"]
    assert (tmp_path / "split" / "base.json").read_bytes() == (tmp_path / "fused" / "base.json").read_bytes()


def test_layers_without_an_adapter_are_no_targets(base: Path, tmp_path: Path) -> None:
    adapted(base, tmp_path / "fused", layers_to_transform=[1], target_modules=["qkv_proj"])
    convert(tmp_path / "fused", tmp_path / "split", "peft-split")
    wanted = [f"model.layers.1.self_attn.{part}" for part in ROWS["qkv_proj"]]
    assert read(tmp_path / "split")[0]["target_modules"] == wanted


def test_a_run_of_phinetune_and_back_into_phinetune(tiny_run: Path, tmp_path: Path) -> None:
    convert(tiny_run, tmp_path / "split", "peft-split")
    convert(tmp_path / "split", tmp_path / "back", "peft-fused")
    (old, before), (new, after) = read(tiny_run), read(tmp_path / "back")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    kept = ("r", "lora_alpha", "base_model_name_or_path", "task_type")
    assert {key: new[key] for key in kept} == {key: old[key] for key in kept}
    assert set(new["target_modules"]) == set(ALL)
    one, other = (open_model(folder, device="cpu", dtype="float32").model for folder in (tiny_run, tmp_path / "back"))
    close(logits(other), logits(one))
    with pytest.raises(ModelError):
        open_model(tmp_path / "split", device="cpu")


# -- split to fused --------------------------------------------------------------------------------------------


def split_adapter(base: Path, folder: Path, **options: Any) -> PeftModel:
    """A live PEFT adapter on the model in Llama's form; every A is its own."""
    defaults = {"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "target_modules": SPLIT}
    config = LoraConfig(**{**defaults, **options})
    model = get_peft_model(llama_form(base), config).eval()
    randomise(model)
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(str(folder))
    return model


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"target_modules": ["q_proj", "v_proj", "up_proj"]},
        {"target_modules": ["q_proj", "down_proj"]},
        {"target_modules": ["k_proj", "gate_proj"]},
        {"rank_pattern": {"k_proj": 2, "up_proj": 6}, "alpha_pattern": {"v_proj": 5, "gate_proj": 3}},
        {"rank_pattern": {"q_proj": 8}, "use_rslora": True},
    ],
    ids=["defaults", "rslora", "q,v,up", "q,down", "k,gate", "patterns", "ranks,rslora"],
)
def test_the_fused_adapter_says_what_the_split_one_does(base: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    split = split_adapter(base, tmp_path / "split", **options)
    convert(tmp_path / "split", tmp_path / "fused", "peft-fused")
    close(logits(on(open_plain(base), tmp_path / "fused")), logits(split))
    assert not torch.allclose(logits(split), logits(open_plain(base)), atol=1e-2)
    _, tensors = read(tmp_path / "fused")
    targets = options.get("target_modules", SPLIT)
    ranks = options.get("rank_pattern", {})
    for whole, parts in ROWS.items():
        rank = sum(ranks.get(part, 4) for part in parts if part in targets)
        found = {tensor.shape[0] for name, tensor in tensors.items() if whole in name and "lora_A" in name}
        assert found == ({rank} if rank else set())
    convert(tmp_path / "fused", tmp_path / "again", "peft-split")
    close(logits(on(llama_form(base), tmp_path / "again")), logits(split))
    # What was stacked comes apart as it was.
    (_, before), (config, after) = read(tmp_path / "split"), read(tmp_path / "again")
    assert {name: t.shape for name, t in before.items()} == {name: t.shape for name, t in after.items()}
    assert set(config["target_modules"]) == set(targets)
    if not ranks:
        assert all(torch.equal(before[name], after[name]) for name in before)


def test_splits_that_share_some_of_their_as_are_stacked_without_repeating_them(base: Path, tmp_path: Path) -> None:
    split = split_adapter(base, tmp_path / "split", target_modules=["q_proj", "k_proj", "v_proj"])
    _, tensors = read(tmp_path / "split")
    for name in [name for name in tensors if "v_proj.lora_A" in name]:
        tensors[name] = tensors[name.replace("v_proj", "q_proj")].clone()
    save_file(tensors, tmp_path / "split" / "adapter_model.safetensors", metadata={"format": "pt"})
    split = on(llama_form(base), tmp_path / "split")
    convert(tmp_path / "split", tmp_path / "fused", "peft-fused")
    config, made = read(tmp_path / "fused")
    assert config["r"] == 8
    assert {t.shape for name, t in made.items() if "lora_A" in name} == {torch.Size([8, 32])}
    close(logits(on(open_plain(base), tmp_path / "fused")), logits(split))


def test_a_dtype_is_kept_where_nothing_is_rounded(base: Path, tmp_path: Path) -> None:
    adapted(base, tmp_path / "fused", dtype=torch.bfloat16, alpha_pattern={"qkv_proj": 16, "down_proj": 7})
    convert(tmp_path / "fused", tmp_path / "split", "peft-split")
    _, tensors = read(tmp_path / "split")
    kinds = {name.split(".")[-3]: t.dtype for name, t in tensors.items() if "lora_B" in name}
    assert kinds == {**dict.fromkeys(SPLIT, torch.bfloat16), "down_proj": torch.float32}
    assert {t.dtype for name, t in tensors.items() if "lora_A" in name} == {torch.bfloat16}


# -- a base that can't be had ----------------------------------------------------------------------------------


def test_without_the_base_the_splits_are_given(base: Path, tmp_path: Path) -> None:
    fused = adapted(base, tmp_path / "fused")
    forget(tmp_path / "fused")
    with pytest.raises(ModelError) as caught:
        convert(tmp_path / "fused", tmp_path / "split", "peft-split")
    text = str(caught.value)
    assert "qkv_proj: it is not known how its 64 rows are split; give it with --merged qkv_proj=Q,K,V" in text
    assert "gate_up_proj: it is not known how its 128 rows are split; give it with --merged gate_up_proj=G,U" in text
    rows = ["qkv_proj=32,16,16", "gate_up_proj=64,64"]
    convert(tmp_path / "fused", tmp_path / "split", "peft-split", merged=rows, base="some/base")
    close(logits(on(llama_form(base), tmp_path / "split")), logits(fused))
    config, _ = read(tmp_path / "split")
    assert config["base_model_name_or_path"] == "some/base"
    assert len(config["target_modules"]) == 14  # how many layers the base has is not known, so each by its full name

    convert(tmp_path / "split", tmp_path / "back", "peft-fused")  # all rows are told by the adapters
    close(logits(on(open_plain(base), tmp_path / "back")), logits(fused))
    split_adapter(base, tmp_path / "q", target_modules=["q_proj"])
    forget(tmp_path / "q")
    with pytest.raises(ModelError, match="how many rows k_proj has; give it with --merged qkv_proj=Q,K,V"):
        convert(tmp_path / "q", tmp_path / "none", "peft-fused")
    convert(tmp_path / "q", tmp_path / "q-fused", "peft-fused", merged=["qkv_proj=32,-16,-16"])
    assert {t.shape[0] for name, t in read(tmp_path / "q-fused")[1].items() if "lora_B" in name} == {64}


def forget(folder: Path) -> None:
    """Remove every record by which the base could be found."""
    (folder / "base.json").unlink(missing_ok=True)
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": "nobody/nothing"}))


# -- what is refused -------------------------------------------------------------------------------------------


def refused(src: Path, dst: Path, to: str, **options: Any) -> str:
    before = sorted(dst.parent.iterdir())
    with pytest.raises(ModelError) as caught:
        convert(src, dst, to, **options)
    assert sorted(dst.parent.iterdir()) == before
    return str(caught.value)


@pytest.mark.parametrize(
    ("source", "rows", "words"),
    [
        ("fused", "qkv_proj=32,16,8", "the splits add up to 56 rows; the layer has 64"),
        ("fused", "qkv_proj=32,32", "2 splits are given; the layer has q_proj, k_proj, v_proj"),
        ("fused", "qkv_proj=32,-16,16", "k_proj has no adapter, but its rows of lora_B are not zero"),
        ("fused", "other=3,3", "--merged other: no layer with an adapter has this name"),
        ("split", "qkv_proj=32,16,8", "8 rows are given for v_proj; its adapter has 16"),
        ("split", "qkv_proj=32,32", "2 splits are given; the layer has q_proj, k_proj, v_proj"),
    ],
    ids=["sum", "count", "adapted", "name", "rows of a split", "count of splits"],
)
def test_rows_that_do_not_fit_are_refused(forms: Path, tmp_path: Path, source: str, rows: str, words: str) -> None:
    to = "peft-split" if source == "fused" else "peft-fused"
    assert words in refused(forms / source, tmp_path / "x", to, merged=[rows])


@pytest.mark.parametrize(
    ("source", "to", "words"),
    [
        ("split", "peft-split", "there is no fused layer (qkv_proj, gate_up_proj)"),
        ("fused", "peft-fused", "there is no split layer (q_proj, k_proj"),
        ("both", "peft-split", "has an adapter, and q_proj has one, too"),
        ("both", "peft-fused", "have adapters, too"),
    ],
)
def test_an_adapter_that_is_converted_already_or_has_both_forms_is_refused(
    forms: Path, tmp_path: Path, source: str, to: str, words: str
) -> None:
    assert words in refused(forms / source, tmp_path / "x", to)


@pytest.mark.parametrize(
    ("options", "words"),
    [({"use_dora": True}, "`use_dora` is set"), ({"modules_to_save": ["norm"]}, "`modules_to_save` is set")],
    ids=["dora", "modules_to_save"],
)
def test_what_is_more_than_a_and_b_is_refused(base: Path, tmp_path: Path, options: dict[str, Any], words: str) -> None:
    adapted(base, tmp_path / "fused", **options)
    assert words in refused(tmp_path / "fused", tmp_path / "x", "peft-split")


def test_options_and_places_are_refused_together(forms: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    text = refused(forms / "fused", tmp_path / "mine", "peft-split", lora_alpha=3, embedding=["e"], linear=["l"])
    for words in (
        "mine: is there already",
        "--lora-alpha only goes with --to peft or loralib",
        "--embedding only goes with --to peft",
        "--linear only goes with --to peft",
    ):
        assert words in text


def test_a_file_is_not_a_peft_adapter(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    words = "a file; --to peft-fused takes a PEFT adapter folder"
    assert words in refused(tmp_path / "mine", tmp_path / "x", "peft-fused")


def test_a_damaged_conversion_is_found_and_not_left(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapted(base, tmp_path / "fused")
    honest = module.write_peft

    def tamper(adapters: Any, folder: Path, *arguments: Any, **options: Any) -> None:
        honest(adapters, folder, *arguments, **options)
        _, tensors = read(folder)
        for name, tensor in tensors.items():
            if "layers.1.self_attn.v_proj.lora_B" in name:
                tensor[0] *= 1.001
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr(module, "write_peft", tamper)
    text = refused(tmp_path / "fused", tmp_path / "split", "peft-split")
    assert "the conversion failed its check, so nothing was written" in text
    assert "layers.1.self_attn.v_proj: its update differs by" in text


# -- the command line ------------------------------------------------------------------------------------------


def test_the_command_both_ways(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    adapted(base, tmp_path / "fused")
    split, back = tmp_path / "split", tmp_path / "back"
    assert run(monkeypatch, "convert", tmp_path / "fused", split, "--to", "peft-split") == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0] == ("Converted 2 down_proj, 2 gate_proj, 2 up_proj, 2 o_proj, 2 q_proj, 2 k_proj, 2 v_proj")
    assert out[1].startswith("Checked on what was written: the update of each layer is the source's")
    assert out[2] == f"Wrote {split}"
    assert out[-1] == f"  vllm serve {base} --enable-lora --max-lora-rank 8 --lora-modules tuned={split}"
    assert run(monkeypatch, "convert", split, back, "--to", "peft-fused") == 0
    assert capsys.readouterr().out.splitlines()[-1] == f'  model = PeftModel.from_pretrained(base_model, "{back}")'
    assert run(monkeypatch, "convert", split, back, "--to", "peft-fused") == 2
    assert "is there already" in capsys.readouterr().err
