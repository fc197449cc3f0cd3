"""A base whose files hold nf4: its weights are turned back, a line says so, and the merged model answers as the run."""

from __future__ import annotations

import io
import logging
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from peft.utils.integrations import dequantize_module_weight
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import phinetune
from helpers import nf4_checkpoint, tiny_config, train_only
from phinetune.checkpoints.load import load_base
from phinetune.checkpoints.opened import open_model
from phinetune.checkpoints.target_modules import linear_layers
from phinetune.config.model import ModelSection
from phinetune.exporting.checkpoint_source import open_checkpoint
from phinetune.exporting.merge.merged import open_merged
from phinetune.exporting.targets import export

pytest.importorskip("bitsandbytes")

SKIPPED = ["lm_head", "model.layers.1.mlp"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, chats: Path) -> Path:
    folder = tmp_path_factory.mktemp("nf4")
    config = tiny_config(chats, folder / "run")
    base = nf4_checkpoint(folder / "base", "llama", llm_int8_skip_modules=SKIPPED)
    config.model = ModelSection(path=str(base), dtype="float32", device="cpu")
    train_only(config)
    return folder / "run"


@pytest.mark.parametrize("base", ["16bit", "quantized"])
def test_the_merged_weights_are_the_files_own_and_the_update(run: Path, base: str) -> None:
    """Either name of the base means the one that there is; nothing is quantised a second time."""
    merged = open_merged(run, base=base)
    assert merged.base_weights == "own nf4"
    assert not hasattr(merged.config, "quantization_config")
    model = load_base(ModelSection(path=str(run.parent / "base"), dtype="float32"), fast=False).model
    saved = load_file(run / "adapter_model.safetensors")
    layers = linear_layers(model)
    assert {type(layer).__name__ for layer in layers.values()} == {"Linear", "Linear4bit"}
    for name, layer in layers.items():
        a, b = (saved[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
        assert torch.equal(merged.tensor(f"{name}.weight"), b @ a * 2 + dequantize_module_weight(layer))


def test_a_merge_says_what_it_did_and_answers_as_the_run(run: Path, tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=200)
    made = phinetune.merge(run, tmp_path / "merged", console=console, device="cpu")
    assert made.record["base_weights"] == "own nf4"
    told = " ".join(console.file.getvalue().split())  # type: ignore[attr-defined]
    assert f"into {run.parent / 'base'}, whose nf4 weights were turned back: 14 of 21 tensors changed" in told
    assert "whose nf4 weights were turned back first" in (tmp_path / "merged" / "README.md").read_text()
    losses = made.record["held_out_loss"]
    assert losses["merged"] == pytest.approx(losses["adapter"], abs=1e-5)
    assert losses["base"] > losses["adapter"] + 0.01
    ids = torch.arange(5, 45)[None]
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    tuned = open_model(run).model
    assert isinstance(tuned, PeftModel)
    with torch.no_grad():
        torch.testing.assert_close(plain(ids).logits, tuned(ids).logits, rtol=1e-4, atol=1e-5)


def test_exports_turn_the_weights_back_with_a_line(run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    base = run.parent / "base"
    with caplog.at_level(logging.WARNING):
        source = open_checkpoint(str(base))
    assert f"{base}: its weights are in nf4; they are turned back into float32" in caplog.text
    model = load_base(ModelSection(path=str(base), dtype="float32"), fast=False).model
    for name, layer in linear_layers(model).items():
        assert torch.equal(source.tensor(f"{name}.weight"), dequantize_module_weight(layer))
    assert export(str(run), "gguf", kind="f32", out=tmp_path / "run.gguf")
