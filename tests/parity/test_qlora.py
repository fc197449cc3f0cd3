"""A 4-bit or 8-bit base trains like transformers, PEFT and bitsandbytes as they are, and its adapter loads there."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from helpers import DEVICE, tiny_config, train_only, write_jsonl
from phinetune.checkpoints.load import load_base
from phinetune.checkpoints.random_shapes import byte_tokenizer
from phinetune.config.model import ModelSection
from phinetune.config.objective import ObjectiveSection

pytest.importorskip("bitsandbytes")

SHAPE = "random:{layers: 2, hidden_size: 64, intermediate_size: 128, heads: 4, kv_heads: 2, vocab: 320}"


def trained(chats: Path, folder: Path, kind: str, engine: str, resume: bool = False, **training: Any) -> Any:
    config = tiny_config(chats, folder, optim="paged_adamw_32bit", **training)
    config.model.path, config.model.quantization, config.engine.kind = SHAPE, kind, engine  # type: ignore[assignment]
    return train_only(config, resume=resume)


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_losses_are_those_of_the_plain_path(chats: Path, tmp_path: Path, kind: str) -> None:
    fast = trained(chats, tmp_path / "fast", kind, "fast")
    trained(chats, tmp_path / "plain", kind, "plain")
    # On CUDA bitsandbytes multiplies int8 by inputs that it rounds to float16.
    near = 1e-3 if (kind, DEVICE) == ("int8", "cuda") else 1e-4
    assert losses(tmp_path / "fast") == pytest.approx(losses(tmp_path / "plain"), rel=near)
    assert {p.dtype for p in fast.model.parameters() if p.requires_grad} == {torch.float32}


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_adapter_of_a_quantised_base_loads_in_plain_peft(chats: Path, tmp_path: Path) -> None:
    run = trained(chats, tmp_path / "run", "nf4", "fast")
    base = load_base(ModelSection(path=SHAPE, quantization="nf4"), fast=False)
    plain = PeftModel.from_pretrained(base.model, tmp_path / "run").eval()
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    with torch.no_grad():
        torch.testing.assert_close(plain(ids).logits, run.model(ids).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_pairs_over_four_bits_are_those_of_trl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses from the first step to the last; after the first, the adapter differs from its reference."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import set_seed
    from trl import DPOConfig, DPOTrainer

    monkeypatch.setenv("PHINETUNE_HOME", str(tmp_path / "home"))
    pairs = [
        {
            "prompt": [{"role": "user", "content": f"How many are {i} and {i}?"}],
            "chosen": [{"role": "assistant", "content": f"They are {2 * i}."}],
            "rejected": [{"role": "assistant", "content": f"No{'!' * i} {i}"}],
        }
        for i in range(6)
    ]
    settings = {"max_steps": 4, "per_device_train_batch_size": 6, "learning_rate": 1e-2, "logging_steps": 1}
    settings |= {"lr_scheduler_type": "constant", "max_grad_norm": 0.0, "save_strategy": "no", "seed": 0}
    config = tiny_config(write_jsonl(tmp_path / "pairs.jsonl", pairs), tmp_path / "run", **settings)
    config.model.path, config.model.quantization, config.data.eval = SHAPE, "nf4", None
    config.objective = ObjectiveSection(kind="dpo")
    config.peft_config = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
    train_only(config)
    loaded = load_base(config.model, fast=False)
    loaded.tokenizer.pad_token = loaded.tokenizer.eos_token
    set_seed(0)
    trainer = DPOTrainer(
        loaded.model,
        args=DPOConfig(
            str(tmp_path / "trl"),
            report_to=[],
            use_cpu=DEVICE == "cpu",
            bf16=False,
            gradient_checkpointing=False,
            **settings,
        ),
        train_dataset=Dataset.from_list(pairs),
        processing_class=loaded.tokenizer,
        peft_config=LoraConfig(**config.peft_config, task_type="CAUSAL_LM"),
    )
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    trainer.train()
    theirs = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses(tmp_path / "run") == pytest.approx(theirs, rel=1e-3)
    assert theirs[-1] < theirs[0] - 0.01


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_resumed_run_over_four_bits_ends_with_the_same_adapter(chats: Path, tmp_path: Path) -> None:
    whole = trained(chats, tmp_path / "whole", "nf4", "fast")
    trained(chats, tmp_path / "part", "nf4", "fast", save_strategy="steps", save_steps=3)
    import shutil

    shutil.rmtree(tmp_path / "part" / "checkpoint-6")
    resumed = trained(chats, tmp_path / "part", "nf4", "fast", resume=True, save_strategy="steps", save_steps=3)
    for ours, theirs in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


LOADING = """
import sys
from pathlib import Path
import bitsandbytes
from phinetune.config.model import ModelSection
from phinetune.config.objective import ObjectiveSection
from phinetune.checkpoints.load import load_base

def status(key):
    line = next(one for one in Path("/proc/self/status").read_text().splitlines() if one.startswith(key))
    return int(line.split()[1]) * 1024

load_base(ModelSection(path="random:{layers: 1, hidden_size: 64, heads: 4, vocab: 320}", quantization="nf4"))
before = status("VmRSS")
Path("/proc/self/clear_refs").write_text("5")
held = load_base(ModelSection(path=sys.argv[1], dtype="float32", quantization="nf4"))
print(status("VmHWM") - before, sys.argv[1] in Path("/proc/self/maps").read_text())
print(held.model.model.layers[0].mlp.down_proj.weight.dtype)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").is_file(), reason="Linux alone tells a peak anew")
def test_a_checkpoint_is_quantised_a_tensor_at_a_time(tmp_path: Path) -> None:
    """Neither while loading nor afterwards is the whole of it in memory unquantised, mapped pages included.

    In a process of its own: what this one's allocator holds from earlier tests would count.
    """
    shape = "random:{layers: 24, hidden_size: 512, intermediate_size: 2048, heads: 8, vocab: 320}"
    load_base(ModelSection(path=shape, dtype="float32")).model.save_pretrained(tmp_path / "base")
    byte_tokenizer(320).save_pretrained(tmp_path / "base")
    size = (tmp_path / "base" / "model.safetensors").stat().st_size
    command = [sys.executable, "-c", LOADING, str(tmp_path / "base")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    grown, mapped, dtype = done.stdout.split()
    assert int(grown) < 0.75 * size  # gaps between tensors of 4 to 16 MB included
    assert mapped == "False"
    assert dtype == "torch.uint8"


def test_no_expanded_weight_is_kept_for_the_backward() -> None:
    """What the graph holds is far less than the weights in 16 bits."""
    from peft import LoraConfig, get_peft_model

    from phinetune.engine.lora_layers import use_fused_layers

    model = load_base(ModelSection(path=SHAPE, quantization="nf4")).model
    config = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    peft = get_peft_model(model, use_fused_layers(config, model))
    layer = peft.get_base_model().model.layers[0].mlp.down_proj
    kept: list[torch.Size] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(torch.randn(3, 128, requires_grad=True))
    assert torch.Size([64, 128]) not in kept
    assert kept


@pytest.mark.parametrize(("rows", "width"), [(96, 64), (40, 128), (33, 48)])
def test_a_weight_read_by_its_blocks_is_bitsandbytes_own(rows: int, width: int) -> None:
    """To the bit, where a row begins inside a scale's block, too."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    from phinetune.engine.lora_layers_4bit import _expand

    torch.manual_seed(0)
    data, state = quantize_4bit(torch.randn(rows, width), quant_type="nf4", compress_statistics=True)
    whole = dequantize_4bit(data, state)
    for most in (None, 7 * width):
        read = list(_expand(data, state, torch.float32, most, torch.float32))
        assert torch.equal(torch.cat([block for _, block in read]), whole)
        assert [part.start for part, _ in read][1:] == [part.stop for part, _ in read][:-1]


def test_four_bits_stay_as_loaded_when_the_base_answers() -> None:
    """With AVX512-BF16 bitsandbytes would pack the weights in another order at the first forward without gradients."""
    model = load_base(ModelSection(path=SHAPE, quantization="nf4")).model
    layer: Any = model.model.layers[0].mlp.down_proj
    before, ids = layer.weight.data.clone(), torch.arange(40)[None]
    with torch.no_grad():
        model(input_ids=ids)
    assert torch.equal(layer.weight.data, before)
    assert layer.weight.quant_state.nested
