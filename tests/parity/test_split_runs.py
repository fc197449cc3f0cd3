"""Runs on a checkpoint whose q, k, v and gate, up are apart: as plain, saved under the base's names, and used."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from rich.console import Console
from safetensors import safe_open
from transformers import AutoModelForCausalLM, Qwen2Config

from exporting.merge.merge_helpers import logits
from helpers import DEVICE, chat, tiny_config, train_only, write_jsonl
from phinetune.api.evaluate import evaluate
from phinetune.api.plan import plan_config
from phinetune.checkpoints.load import load_base, read_config
from phinetune.checkpoints.opened import open_model
from phinetune.checkpoints.random_shapes import parse_shape
from phinetune.checkpoints.starter import fused_state_dict
from phinetune.config.model import ModelSection
from phinetune.config.run import RunConfig
from phinetune.errors import ConfigError, ModelError
from phinetune.exporting.convert.convert import convert
from phinetune.exporting.merge.merge import merge_run
from phinetune.planning.probe import two_layers

SIZES = "layers: 2, hidden_size: 32, intermediate_size: 64, heads: 4, kv_heads: 2, vocab: 300"
FAMILIES = ("llama", "mistral", "qwen2")
PARTS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def checkpoint(family: str, folder: Path) -> Path:
    """A checkpoint of random weights, biases and norms included."""
    loaded = load_base(ModelSection(path=f"random:{{model_type: {family}, {SIZES}}}", device=DEVICE), fast=False)
    with torch.no_grad():
        for i, weight in enumerate(loaded.model.parameters()):
            if weight.dim() == 1:
                weight += torch.linspace(-0.3, 0.3, weight.numel(), device=weight.device).roll(i)
    loaded.model.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)
    return folder


def config_for(base: Path, out: Path, **model: Any) -> RunConfig:
    rows = [chat(f"{i} and {i}? " + "Please. " * (i % 5), f"{2 * i} " * (1 + i % 3)) for i in range(12)]
    config = tiny_config(write_jsonl(out.with_suffix(".jsonl"), rows), out, max_steps=3)
    config.model = ModelSection(path=str(base), dtype="float32", device=DEVICE, **model)
    return config


def losses(folder: Path) -> list[float]:
    entries = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [entry["loss"] for entry in entries if "loss" in entry]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_fast_run_is_the_plain_one_and_every_tool_reads_its_adapter(family: str, tmp_path: Path) -> None:
    base = checkpoint(family, tmp_path / "base")
    for kind in ("fast", "plain"):
        config = config_for(base, tmp_path / kind)
        config.engine.kind = kind  # type: ignore[assignment]
        train_only(config)
    assert losses(tmp_path / "fast") == pytest.approx(losses(tmp_path / "plain"), rel=1e-4)
    with safe_open(tmp_path / "fast" / "adapter_model.safetensors", "pt") as file:
        assert {name.split(".lora_")[0].rsplit(".", 1)[1] for name in file.keys()} == PARTS  # noqa: SIM118
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    untuned = logits(plain)
    wanted = logits(PeftModel.from_pretrained(plain, str(tmp_path / "fast")).eval())
    assert (wanted - untuned).abs().max() > 0.1
    opened = open_model(tmp_path / "fast", dtype="float32", device=DEVICE)
    torch.testing.assert_close(logits(opened.model), wanted, rtol=1e-4, atol=1e-5)
    merge_run(tmp_path / "fast", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    assert type(merged) is type(plain)
    torch.testing.assert_close(logits(merged), wanted, rtol=1e-4, atol=1e-5)


def test_transformers_own_logits_are_given_to_the_bit_by_the_plain_engine(tmp_path: Path) -> None:
    base = checkpoint("llama", tmp_path / "base")
    ours = load_base(ModelSection(path=str(base), dtype="float32", device=DEVICE), fast=False).model
    theirs = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval().to(DEVICE)
    assert torch.equal(logits(ours), logits(theirs))


def test_phi3_and_the_same_model_in_llamas_form_train_alike(tmp_path: Path) -> None:
    """Every part has an adapter of its own in Llama's form, so the runs differ; the base is the same model."""
    llama = checkpoint("llama", tmp_path / "llama")
    split = load_base(ModelSection(path=str(llama), dtype="float32", device=DEVICE), fast=False).model
    shape = f"random:{{{SIZES}, rms_norm_eps: 1.0e-6, sliding_window: null}}"
    fused = load_base(ModelSection(path=shape, dtype="float32", device=DEVICE), fast=False).model
    fused.load_state_dict(fused_state_dict(split.state_dict()))
    torch.testing.assert_close(logits(fused), logits(split), rtol=1e-5, atol=1e-6)


def test_either_naming_is_taken_and_an_adapter_of_the_other_form_is_told_how_to_fit(tmp_path: Path) -> None:
    base = checkpoint("llama", tmp_path / "base")
    config = config_for(base, tmp_path / "run")
    config.peft_config["target_modules"] = ["qkv_proj", "up_proj"]
    train_only(config)
    with safe_open(tmp_path / "run" / "adapter_model.safetensors", "pt") as file:
        found = {name.split(".lora_")[0].rsplit(".", 1)[1] for name in file.keys()}  # noqa: SIM118
    assert found == {"q_proj", "k_proj", "v_proj", "up_proj"}
    convert(tmp_path / "run", tmp_path / "fused", "peft-fused")
    with pytest.raises(ModelError, match="names fused layers, which this base has split: `phinetune convert"):
        open_model(tmp_path / "fused")


def test_a_run_is_evaluated_and_gone_on_from(tmp_path: Path) -> None:
    base = checkpoint("mistral", tmp_path / "base")
    train_only(config_for(base, tmp_path / "first"))
    quiet = Console(file=io.StringIO())
    rows = str(tmp_path / "first.jsonl")
    found = evaluate(str(tmp_path / "first"), rows, {"max_new_tokens": 4, "max_prompts": 2}, console=quiet)
    assert found.results["tuned"]["loss"] < found.results["base"]["loss"]
    train_only(config_for(base, tmp_path / "next", adapter=str(tmp_path / "first")))
    record = json.loads((tmp_path / "next" / "base.json").read_text())
    assert record["started_from"]["adapter"] == str(tmp_path / "first")
    assert losses(tmp_path / "next")[0] < losses(tmp_path / "first")[0]
    wider = config_for(base, tmp_path / "wider", adapter=str(tmp_path / "first"))
    wider.peft_config["r"] = 8
    with pytest.raises(ConfigError, match="merge it first for a new one on top: phinetune merge"):
        train_only(wider)


def test_in_4_bits_a_fast_run_is_the_plain_one(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    base = checkpoint("mistral", tmp_path / "base")
    for kind in ("fast", "plain"):
        config = config_for(base, tmp_path / f"nf4-{kind}", quantization="nf4")
        config.engine.kind = kind  # type: ignore[assignment]
        train_only(config)
    assert losses(tmp_path / "nf4-fast") == pytest.approx(losses(tmp_path / "nf4-plain"), rel=1e-3)


def test_a_plan_measures_layers_of_the_models_own_family(tmp_path: Path) -> None:
    base = checkpoint("qwen2", tmp_path / "base")
    config = config_for(base, tmp_path / "run")
    shape = read_config(base)
    measured = parse_shape(two_layers(config.model, shape).path)
    assert isinstance(measured, Qwen2Config)
    assert measured.hidden_size == shape.hidden_size
    made = plan_config(config)
    assert made.seconds is not None
