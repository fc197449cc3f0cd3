"""Parts of a base that an adapter trains whole: on a base in few bits, in each dtype, on each engine; else refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from helpers import tiny_config, train_only
from phinetune.api.evaluate import evaluate
from phinetune.api.merge import merge
from phinetune.api.train import train_config
from phinetune.checkpoints.load import Loaded, load_base
from phinetune.checkpoints.opened import open_model
from phinetune.config.model import ModelSection
from phinetune.config.run import RunConfig
from phinetune.errors import ConfigError, ModelError
from phinetune.training.prepare import prepare_run, settle

pytest.importorskip("bitsandbytes")

HEAD, EMBED = {"modules_to_save": ["lm_head"]}, {"modules_to_save": ["embed_tokens"]}
BOTH, NORM = {"modules_to_save": ["lm_head", "embed_tokens"]}, {"modules_to_save": ["norm"]}
TOKENS, DORA = {"trainable_token_indices": [5, 6]}, {"use_dora": True}
CASES = [
    *[("nf4", "bfloat16", "plain", parts) for parts in (HEAD, EMBED, BOTH, NORM)],
    *[("int8", "bfloat16", "plain", parts) for parts in (HEAD, BOTH)],
    *[("nf4", "bfloat16", "fast", parts) for parts in (HEAD, TOKENS, DORA)],
    *[("nf4", "float32", "plain", BOTH), ("int8", "float32", "fast", EMBED)],
]


def config_of(
    chats: Path, folder: Path, quantization: str, dtype: str, engine: str, parts: dict[str, Any], **training: Any
) -> RunConfig:
    evaluated = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    config = tiny_config(chats, folder, **{"max_steps": 4, **evaluated, **training})
    config.model.quantization, config.model.dtype, config.engine.kind = quantization, dtype, engine  # type: ignore[assignment]
    config.evaluation.generate, config.evaluation.fixed_prompts = False, 0
    config.peft_config |= parts
    return config


@pytest.mark.parametrize(("quantization", "dtype", "engine", "parts"), CASES, ids=str)
def test_it_trains_is_evaluated_and_resumes_to_the_bit(
    chats: Path, tmp_path: Path, console: Console, quantization: str, dtype: str, engine: str, parts: dict[str, Any]
) -> None:
    config = config_of(chats, tmp_path / "run", quantization, dtype, engine, parts)
    made = train_config(config, console)
    assert made.results["evaluation"]["tuned"]["loss"] < made.results["evaluation"]["base"]["loss"]
    before = load_file(made.path / "adapter_model.safetensors")
    for name in ("checkpoint-4", "results.json"):
        shutil.rmtree(made.path / name) if name == "checkpoint-4" else (made.path / name).unlink()
    train_only(config, resume=True)
    after = load_file(made.path / "adapter_model.safetensors")
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


@pytest.mark.parametrize(("quantization", "parts"), [("nf4", HEAD), ("nf4", EMBED), ("int8", BOTH)], ids=str)
def test_what_was_trained_is_evaluated_again_and_merged(
    chats: Path, tmp_path: Path, console: Console, quantization: str, parts: dict[str, Any]
) -> None:
    made = train_config(config_of(chats, tmp_path / "run", quantization, "bfloat16", "plain", parts), console)
    again = evaluate(made.path, console=console)
    assert again.results["tuned"]["loss"] == pytest.approx(made.results["evaluation"]["tuned"]["loss"], rel=1e-5)
    merged = merge(made.path, tmp_path / "merged").path
    saved, whole = load_file(made.path / "adapter_model.safetensors"), load_file(merged / "model.safetensors")
    for part, name in (("lm_head", "lm_head.weight"), ("embed_tokens", "model.embed_tokens.weight")):
        if part in parts["modules_to_save"]:
            trained = saved[f"base_model.model.{name}"]
            assert torch.equal(whole[name].float(), trained.to(whole[name].dtype).float())


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({"modules_to_save": ["qkv_proj"], "target_modules": ["o_proj"]}, "layers.0.self_attn.qkv_proj is held as"),
        ({"modules_to_save": ["q_proj"], "target_modules": ["o_proj"]}, "qkv_proj is held as"),
        ({"modules_to_save": ["mlp"], "target_modules": ["o_proj"]}, "layers.1.mlp is held as"),
        ({"modules_to_save": ["lm_head", "down_proj"], "target_modules": ["o_proj"]}, "mlp.down_proj is held as"),
    ],
    ids=["fused", "split", "block", "one of two"],
)
def test_parts_in_few_bits_are_refused_before_a_weight_is_loaded(
    chats: Path, tmp_path: Path, quantization: str, parts: dict[str, Any], words: str
) -> None:
    config = config_of(chats, tmp_path / "run", quantization, "float32", "fast", parts)
    with pytest.raises(ConfigError) as caught:
        prepare_run(settle(config))
    assert words in str(caught.value)
    assert "lm_head" not in str(caught.value.problems[0])
    config.model.quantization = "none"
    prepare_run(settle(config))


@pytest.mark.parametrize("parts", [HEAD, NORM, {"modules_to_save": ["input_layernorm"]}], ids=str)
@pytest.mark.parametrize("engine", ["fast", "plain"])
def test_parts_in_float16_are_refused(chats: Path, tmp_path: Path, parts: dict[str, Any], engine: str) -> None:
    with pytest.raises(ConfigError, match="would be trained in float16"):
        prepare_run(settle(config_of(chats, tmp_path / "run", "none", "float16", engine, parts)))


def test_lora_alone_is_taken_over_float16(chats: Path, tmp_path: Path) -> None:
    prepare_run(settle(config_of(chats, tmp_path / "run", "none", "float16", "fast", {})))


def test_dora_over_int8_is_refused_on_a_cpu_in_training_and_when_it_is_opened(chats: Path, tmp_path: Path) -> None:
    config = config_of(chats, tmp_path / "run", "int8", "float32", "fast", DORA, max_steps=1, eval_strategy="no")
    with pytest.raises(ConfigError, match="PEFT loses the scales of an int8 base"):
        prepare_run(settle(config))
    config.model.quantization = "none"
    train_only(config)
    with pytest.raises(ModelError, match="PEFT loses the scales of an int8 base"):
        open_model(tmp_path / "run", quantization="int8")


@pytest.mark.parametrize(
    ("quantization", "parts"),
    [("none", HEAD), ("none", EMBED), ("none", {**HEAD, "ensure_weight_tying": True}), ("nf4", BOTH)],
    ids=str,
)
def test_a_tied_base_is_exported_as_it_was_trained(
    chats: Path, tmp_path: Path, tiny: Loaded, console: Console, quantization: str, parts: dict[str, Any]
) -> None:
    """Head and embedding are one tensor; the one that is not trained stays, or follows where `ensure_weight_tying`."""
    base = tmp_path / "tied"
    tiny.model.config.tie_word_embeddings = True
    tiny.model.tie_weights()
    tiny.model.save_pretrained(base)
    tiny.tokenizer.save_pretrained(base)
    config = config_of(chats, tmp_path / "run", quantization, "float32", "fast", parts)
    config.model.path = str(base)
    made = train_config(config, console)
    model = open_model(made.path, quantization="none").model
    merged = merge(made.path, tmp_path / "merged").path
    ids = torch.arange(5, 30)[None]
    with torch.no_grad():
        wanted = model(ids).logits
        found = load_base(ModelSection(path=str(merged), dtype="float32")).model(ids).logits
    assert torch.allclose(wanted, found, atol=1e-4)
    if parts is BOTH or parts is HEAD:
        tied = json.loads((merged / "config.json").read_text())["tie_word_embeddings"]
        assert tied is False
