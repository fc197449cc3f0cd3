"""Small models with adapters of PEFT and of loralib, for the tests of converting between them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import phinetune.lora as lora
from helpers import TINY
from phinetune.checkpoints.load import load_base
from phinetune.config.model import ModelSection

IDS = torch.tensor([[5, 6, 7, 250, 9]])
PHI3_QKV = "qkv_proj=32,16,16"


class Net(nn.Module):
    """An embedding, one fused layer, two split ones and a head; `make` gives the layers."""

    def __init__(self, make: Mapping[str, Callable[[], nn.Module]]) -> None:
        super().__init__()
        self.emb = make.get("emb", lambda: nn.Embedding(11, 6))()
        self.block = nn.Module()
        self.block.qkv_proj = make.get("qkv_proj", lambda: nn.Linear(6, 12))()
        self.block.up = make.get("up", lambda: nn.Linear(12, 10))()
        self.head = make.get("head", lambda: nn.Linear(10, 3))()

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.block.qkv_proj(self.emb(ids)).tanh()
        return self.head(self.block.up(hidden).tanh())


def randomise(model: nn.Module, seed: int = 1) -> None:
    """Give every adapter random numbers."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)


def base_state(seed: int = 0) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return Net({}).state_dict()


def unadapted_net() -> Net:
    net = Net({})
    net.load_state_dict(base_state())
    return net


def adapted_net(**make: Callable[[], nn.Module]) -> Net:
    """A net with layers of loralib or phinetune.lora on the same base, and random adapters.

    It is in training mode, so nothing is merged yet: to load into loralib's layers after `eval()` would merge twice.
    """
    net = Net(make)
    net.load_state_dict(base_state(), strict=False)
    randomise(net)
    return net


def peft_net(folder: Path, **options: Any) -> tuple[Tensor, Path]:
    """(output, `folder`) of a live PEFT adapter on the net; the adapter is saved to `folder`."""
    model = get_peft_model(unadapted_net(), LoraConfig(**{"r": 4, "lora_alpha": 6, **options})).eval()
    randomise(model)
    model.save_pretrained(str(folder))
    return output(model), folder


def output(model: nn.Module, ids: Tensor = IDS % 11) -> Tensor:
    with torch.no_grad():
        out = model(ids)
    return out.logits if hasattr(out, "logits") else out


def save(model: nn.Module, file: Path) -> Path:
    torch.save(lora.lora_state_dict(model), file)
    return file


def into(model: nn.Module, file: Path) -> nn.Module:
    """`model` with a converted checkpoint, loaded as the report says. The model must have a place for every tensor."""
    found = model.load_state_dict(torch.load(file, weights_only=True), strict=False)
    assert not found.unexpected_keys
    assert not [name for name in found.missing_keys if "lora_" in name]
    return model.eval()


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


class Attention(nn.Module):
    """q, k and v with 4, 2 and 2 features, as three layers or fused."""

    def __init__(self, fused: nn.Module | None = None) -> None:
        super().__init__()
        self.attn = nn.Module()
        self.fused = fused is not None
        if fused is not None:
            self.attn.qkv_proj = fused
        else:
            for name, rows in (("q_proj", 4), ("k_proj", 2), ("v_proj", 2)):
                setattr(self.attn, name, nn.Linear(6, rows))

    def forward(self, x: Tensor) -> Tensor:
        if self.fused:
            return self.attn.qkv_proj(x)
        return torch.cat([self.attn.q_proj(x), self.attn.k_proj(x), self.attn.v_proj(x)], dim=-1)


def live_phi3(folder: Path, targets: Sequence[str], **options: Any) -> tuple[Tensor, Path]:
    """(logits, `folder`) of a PEFT adapter on a random Phi-3; the adapter is saved to `folder`."""
    config = LoraConfig(r=4, lora_alpha=8, target_modules=list(targets), task_type="CAUSAL_LM", **options)
    model = get_peft_model(load_base(ModelSection(path=TINY)).model, config).eval()
    randomise(model)
    model.save_pretrained(str(folder))
    return output(model, IDS), folder
