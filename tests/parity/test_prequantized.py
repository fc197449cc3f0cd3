"""A checkpoint that bitsandbytes quantised to nf4 trains as it does with transformers and PEFT, and so does its run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from engine.engine_helpers import assert_same, make_rows, one_by_one, packed
from helpers import DEVICE, nf4_checkpoint, tiny_config, train_only
from phinetune.checkpoints.load import load_base
from phinetune.checkpoints.opened import open_model
from phinetune.checkpoints.quantize import keep_packing
from phinetune.config.model import ModelSection
from phinetune.engine.lora_layers import use_fused_layers

pytest.importorskip("bitsandbytes")

SKIPPED = ["lm_head", "model.layers.1.mlp", "model.layers.0.self_attn.o_proj"]  # as `…-unsloth-bnb-4bit` has it
FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "phi3": ("phi3", {}),
    "phi3, single": ("phi3", {"bnb_4bit_use_double_quant": False}),
    "phi3, some layers": ("phi3", {"llm_int8_skip_modules": SKIPPED}),
    "llama": ("llama", {}),
    "llama, single": ("llama", {"bnb_4bit_use_double_quant": False}),
    "mistral, some layers": ("mistral", {"llm_int8_skip_modules": SKIPPED}),
}
forms = pytest.mark.parametrize(("family", "bits"), FORMS.values(), ids=FORMS)
LORA = {"r": 2, "lora_alpha": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", "init_lora_weights": False}


def theirs(folder: Path) -> Any:
    """transformers' own model of it. On a CPU with AVX512-BF16 bitsandbytes would repack and round it."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    keep_packing(model)
    return model.eval()


def section_of(folder: Path) -> ModelSection:
    return ModelSection(path=str(folder), dtype="float32", device=DEVICE)


@forms
def test_logits_are_those_of_transformers(family: str, bits: dict[str, Any], tmp_path: Path) -> None:
    base = nf4_checkpoint(tmp_path / "base", family, **bits)
    ids = torch.arange(5, 45, device=DEVICE)[None]
    with torch.no_grad():
        wanted = theirs(base)(ids).logits
        assert torch.equal(load_base(section_of(base), fast=False).model(ids).logits, wanted)
        found = load_base(section_of(base)).model(ids).logits
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore::UserWarning")
@forms
def test_loss_and_gradients_are_those_of_peft(family: str, bits: dict[str, Any], tmp_path: Path) -> None:
    base, rows = nf4_checkpoint(tmp_path / "base", family, **bits), make_rows((5, 33, 70, 64))
    torch.manual_seed(1)
    plain = get_peft_model(theirs(base), LoraConfig(**LORA))  # type: ignore[arg-type]
    model = load_base(section_of(base)).model
    fast = get_peft_model(model, use_fused_layers(LoraConfig(**LORA), model))  # type: ignore[arg-type]
    drawn = {name: value for name, value in plain.named_parameters() if "lora_" in name}
    with torch.no_grad():
        for name, parameter in fast.named_parameters():
            if "lora_" in name:
                parameter.copy_(drawn[name])
    found = packed(fast.eval(), rows)
    assert len(found.gradients) == len(drawn) == (16 if family == "phi3" else 28)
    assert_same(found, one_by_one(plain.eval(), rows))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("family", ["phi3", "llama"])
def test_a_runs_adapter_loads_in_peft_on_that_very_checkpoint(family: str, chats: Path, tmp_path: Path) -> None:
    base = nf4_checkpoint(tmp_path / "base", family, llm_int8_skip_modules=SKIPPED)
    config = tiny_config(chats, tmp_path / "run")
    config.model = section_of(base)
    run = train_only(config)
    ids = torch.arange(5, 45, device=DEVICE)[None]
    with torch.no_grad():
        wanted = PeftModel.from_pretrained(theirs(base), tmp_path / "run").eval()(ids).logits
        torch.testing.assert_close(run.model.eval()(ids).logits, wanted, rtol=1e-4, atol=1e-5)
        opened = open_model(tmp_path / "run")
        torch.testing.assert_close(opened.model(ids).logits, wanted, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(theirs(base)(ids).logits, wanted, atol=1e-2)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_run_that_goes_on_ends_with_the_same_adapter(chats: Path, tmp_path: Path) -> None:
    """The second start names the form that the files have; that is no change."""
    import shutil

    base = nf4_checkpoint(tmp_path / "base", "llama")
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    ends = []
    for name in ("whole", "part"):
        config = tiny_config(chats, tmp_path / name, **settings)
        config.model = section_of(base)
        ends.append(train_only(config).model)
    shutil.rmtree(tmp_path / "part" / "checkpoint-4")
    config.model.quantization = "nf4"
    resumed = train_only(config, resume=True)
    for ours, others in zip(ends[0].parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(ours, others)


def test_products_are_in_the_dtype_that_is_asked_for(tmp_path: Path) -> None:
    """transformers leaves embeddings, norms and head of such a checkpoint in the files' dtype."""
    base = nf4_checkpoint(tmp_path / "base", "llama", bnb_4bit_compute_dtype=torch.float16)
    for fast in (True, False):
        model = load_base(section_of(base).model_copy(update={"dtype": "bfloat16"}), fast=fast).model
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16, torch.uint8}
        assert model.model.layers[0].mlp.down_proj.compute_dtype == torch.bfloat16
        assert model(torch.arange(5, 45, device=DEVICE)[None]).logits.dtype == torch.bfloat16
