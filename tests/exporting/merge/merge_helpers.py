"""For the tests of merging: a tiny base in a folder, random adapters on it, and the logits of both together."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import Phi3ForCausalLM

from helpers import TINY
from phinetune.checkpoints.adapters import BASE_FILE
from phinetune.checkpoints.load import Base, load_base
from phinetune.checkpoints.random_shapes import SHORT_NAMES
from phinetune.checkpoints.weight_files import fingerprint
from phinetune.config.model import ModelSection

IDS = torch.arange(24).reshape(2, 12) * 11 % 256


def save_base(folder: Path, dtype: str = "float32", shards: str = "40KB", **shape: Any) -> Path:
    """The tiny model as a checkpoint's folder, in several files."""
    tiny = yaml.safe_load(TINY.removeprefix("random:"))
    sizes = {**{SHORT_NAMES.get(key, key): value for key, value in tiny.items()}, **shape}
    path = f"random:{json.dumps(sizes)}"
    loaded = load_base(ModelSection(path=path, dtype=dtype, device="cpu"), fast=False)
    with torch.no_grad():  # a norm of ones would hide that it is trained
        for i, (name, weight) in enumerate(loaded.model.named_parameters()):
            if "norm" in name:
                weight += torch.linspace(-0.3, 0.3, weight.numel()).roll(i)
    loaded.model.save_pretrained(folder, max_shard_size=shards)
    loaded.tokenizer.save_pretrained(folder)
    return folder


def open_plain(folder: Path, dtype: Any = "auto") -> Phi3ForCausalLM:
    """A folder's model, loaded by transformers alone. No tensor may be missing, left over or of another shape."""
    model, info = Phi3ForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


def adapted(base: Path, folder: Path, dtype: torch.dtype | None = None, **options: Any) -> PeftModel:
    """PEFT's model of `base` with a random adapter. The adapter is saved in `folder`, as phinetune does it."""
    config = LoraConfig(
        **{"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "target_modules": "all-linear", **options}
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(open_plain(base), config, autocast_adapter_dtype=dtype is None).eval()
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in ("lora_A", "lora_B", "lora_embedding")):
                parameter.copy_(torch.randn(parameter.shape) * 0.2)
            if "magnitude" in name or "modules_to_save" in name:
                parameter.mul_(1 + torch.rand(parameter.shape) * 0.3)
    if config.ensure_weight_tying:
        _tie_adapters(model)
    if dtype:
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.to(dtype)
    model.save_pretrained(str(folder), save_embedding_layers=False)
    (folder / BASE_FILE).write_text(Base(str(base), None, fingerprint(base)).to_json())
    return model


def _tie_adapters(model: PeftModel) -> None:
    """Give both sides of a tied adapter the same numbers. PEFT ties them only when it makes them."""
    core = model.get_base_model()
    if hasattr(core.lm_head, "lora_A"):
        core.lm_head.lora_A["default"].weight.data = core.model.embed_tokens.lora_embedding_B["default"].data.T
        core.lm_head.lora_B["default"].weight.data = core.model.embed_tokens.lora_embedding_A["default"].data.T


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(IDS.to(model.device), use_cache=False).logits.float().cpu()
