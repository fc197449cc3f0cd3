"""An adapter's GGUF on a GGUF of its base makes llama.cpp answer as PEFT does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from peft import PeftModel
from safetensors.torch import load_file

from exporting.export_helpers import TunedStarter
from exporting.gguf.gguf_helpers import chat_ids, greedy, keys_of, llama, random_adapter, tensors_of
from helpers import TINY
from phinetune.api.talk import load
from phinetune.errors import ModelError
from phinetune.exporting.targets import export

QUESTION = [{"role": "user", "content": "How many are 2 and 2?"}]
TIED = TINY.replace("}", ", tie_word_embeddings: true}")
QKV, DOWN = "model.layers.1.self_attn.qkv_proj", "model.layers.1.mlp.down_proj"


def adapter(folder: Path, base: str = TINY, **options: Any) -> tuple[PeftModel, Any]:
    """(a tiny model with an adapter large enough to change its answers, its tokenizer), saved in `folder`."""
    model, tokenizer = load(base, dtype="float32", device="cpu")
    return random_adapter(model, folder, base, size=1.0, **options), tokenizer


def answers(tmp_path: Path, folder: Path, ids: list[int], base: str = TINY) -> list[list[int]]:
    """What llama.cpp answers with the base alone, and with the adapter on it."""
    export(base, "gguf", kind="f32", out=tmp_path / "base.gguf", overwrite=True)
    export(str(folder), "gguf-lora", out=tmp_path / "lora.gguf", overwrite=True)
    found = []
    for lora in (None, tmp_path / "lora.gguf"):
        with llama(tmp_path / "base.gguf", lora) as server:
            found.append(server.greedy(ids, 40))
    return found


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"alpha_pattern": {"down_proj": 20, "o_proj": 3}},
        {"rank_pattern": {"qkv_proj": 2}, "alpha_pattern": {"down_proj": 20}, "use_rslora": True},
        {"target_modules": ["qkv_proj", "embed_tokens", "lm_head"]},
        {"target_modules": ["gate_up_proj"], "r": 1},
    ],
    ids=["defaults", "rslora", "alphas", "ranks", "embeddings", "one layer"],
)
def test_an_adapter_in_llama_cpp_answers_as_in_peft(tmp_path: Path, options: dict[str, Any]) -> None:
    tuned, tokenizer = adapter(tmp_path / "adapter", **options)
    ids = chat_ids(tokenizer, QUESTION)
    base, with_adapter = answers(tmp_path, tmp_path / "adapter", ids)
    assert with_adapter == greedy(tuned, ids, 40)
    assert with_adapter != base


def test_a_run_in_llama_cpp_answers_as_in_peft(tiny_run: Path, tmp_path: Path) -> None:
    tuned, tokenizer = load(tiny_run, dtype="float32", device="cpu")
    ids = chat_ids(tokenizer, QUESTION)
    assert answers(tmp_path, tiny_run, ids)[1] == greedy(tuned, ids, 40)


@pytest.mark.starter
@pytest.mark.slow
def test_an_adapter_on_the_starter_in_llama_cpp_answers_as_in_peft(tuned_starter: TunedStarter, tmp_path: Path) -> None:
    tuned, tokenizer, folder, chats = tuned_starter
    ids = chat_ids(tokenizer, chats[1])
    base, with_adapter = answers(tmp_path, folder, ids, "starter")
    assert with_adapter == greedy(tuned, ids, 40)
    assert with_adapter != base


# -- what is written -------------------------------------------------------------------------------------------


def test_numbers_and_keys_are_peft_s_own(tmp_path: Path) -> None:
    adapter(tmp_path / "adapter", target_modules=["qkv_proj", "down_proj", "embed_tokens", "lm_head"])
    export(str(tmp_path / "adapter"), "gguf-lora", out=tmp_path / "a.gguf")
    keys, found = keys_of(tmp_path / "a.gguf"), tensors_of(tmp_path / "a.gguf")
    expected = {
        "general.architecture": "phi3",
        "general.type": "adapter",
        "adapter.type": "lora",
        "adapter.lora.alpha": 8.0,
        "general.name": "adapter",
    }
    assert {key: keys[key] for key in expected} == expected
    names = {QKV: "blk.1.attn_qkv", DOWN: "blk.1.ffn_down", "lm_head": "output"}
    state = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    for theirs, ours in names.items():
        for part in "AB":
            numbers = state[f"base_model.model.{theirs}.lora_{part}.weight"].numpy()
            assert np.array_equal(found[f"{ours}.weight.lora_{part.lower()}"].data, numbers), (theirs, part)
    embed = "base_model.model.model.embed_tokens.lora_embedding_"
    assert np.array_equal(found["token_embd.weight.lora_a"].data, state[f"{embed}A"].numpy().T)
    assert np.array_equal(found["token_embd.weight.lora_b"].data, state[f"{embed}B"].numpy())
    assert len(found) == 12


def test_other_scales_go_into_b(tmp_path: Path) -> None:
    adapter(tmp_path / "adapter", target_modules=["qkv_proj", "down_proj"], alpha_pattern={"down_proj": 20})
    export(str(tmp_path / "adapter"), "gguf-lora", out=tmp_path / "a.gguf")
    found = tensors_of(tmp_path / "a.gguf")
    state = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert keys_of(tmp_path / "a.gguf")["adapter.lora.alpha"] == 8.0
    for theirs, ours, scale in ((QKV, "blk.1.attn_qkv", 1.0), (DOWN, "blk.1.ffn_down", 2.5)):
        b = state[f"base_model.model.{theirs}.lora_B.weight"].numpy()
        assert np.array_equal(found[f"{ours}.weight.lora_b"].data, b * np.float32(scale)), theirs


@pytest.mark.parametrize(("kind", "a", "b"), [("f16", "F16", "F16"), ("bf16", "BF16", "BF16"), ("q8_0", "Q8_0", "F16")])
def test_types_are_as_for_a_model(tmp_path: Path, kind: str, a: str, b: str) -> None:
    """The rows of B hold 4 numbers, a rank, which do not fill a block of q8_0."""
    adapter(tmp_path / "adapter", target_modules=["down_proj"])
    export(str(tmp_path / "adapter"), "gguf-lora", kind=kind, out=tmp_path / "a.gguf")
    found = tensors_of(tmp_path / "a.gguf")
    assert [found[f"blk.0.ffn_down.weight.lora_{part}"].tensor_type.name for part in "ab"] == [a, b]


# -- refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("base", "options", "words"),
    [
        (TINY, {"use_dora": True}, "DoRA's magnitude has no place in llama.cpp's LoRA"),
        (TINY, {"modules_to_save": ["lm_head"]}, "lm_head.weight: the adapter replaces it"),
        (TIED, {"target_modules": ["embed_tokens"]}, "embedding and output head are one"),
        (TIED, {"target_modules": ["lm_head"]}, "embedding and output head are one"),
        (TINY, {"lora_alpha": 0}, "lora_alpha is 0"),
    ],
    ids=["dora", "whole module", "tied embedding", "tied head", "alpha"],
)
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_what_llama_cpps_lora_can_not_hold_is_refused(
    tmp_path: Path, base: str, options: dict[str, Any], words: str
) -> None:
    adapter(tmp_path / "adapter", base, **options)
    with pytest.raises(ModelError) as caught:
        export(str(tmp_path / "adapter"), "gguf-lora", out=tmp_path / "a.gguf")
    assert words in str(caught.value)
    assert "with --to gguf" in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]
    if options != {"lora_alpha": 0}:  # as the sentence says
        export(str(tmp_path / "adapter"), "gguf", out=tmp_path / "merged.gguf")


def test_a_model_has_no_adapter_to_write(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no adapter there"):
        export(TINY, "gguf-lora", out=tmp_path / "a.gguf")


def test_the_commands_make_the_base_and_lay_the_adapter_on(tiny_run: Path, tmp_path: Path) -> None:
    made = export(str(tiny_run), "gguf-lora", out=tmp_path / "a.gguf")
    assert made.report("PHI")[-2:] == [
        f"  PHI export '{TINY}' --to gguf --type f16 --out random-f16.gguf",
        f"  llama-cli -m random-f16.gguf --lora {tmp_path / 'a.gguf'} -c 4096 --temp 0",
    ]
