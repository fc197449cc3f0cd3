"""The snippets of loralib's README and of the guide, with nothing but the import changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import phinetune.lora as lora

d_model, in_features, out_features = 8, 8, 8


class BigModel(nn.Module):
    """Attention as the README's additional notes adapt it: broken up, and with one projection for q, k and v."""

    def __init__(self) -> None:
        super().__init__()
        # ===== Before =====
        # layer = nn.Linear(in_features, out_features)
        # ===== After ======
        # Add a pair of low-rank adaptation matrices with rank r=16
        self.layer = lora.Linear(in_features, out_features, r=16)
        # ===== Before =====
        # qkv_proj = nn.Linear(d_model, 3*d_model)
        # ===== After =====
        # Break it up (remember to modify the pretrained checkpoint accordingly)
        self.q_proj = lora.Linear(d_model, d_model, r=8)
        self.k_proj = nn.Linear(d_model, d_model)
        self.v_proj = lora.Linear(d_model, d_model, r=8)
        # Alternatively, use lora.MergedLinear (recommended)
        self.qkv_proj = lora.MergedLinear(d_model, 3 * d_model, r=8, enable_lora=[True, False, True])
        self.norm = nn.LayerNorm(d_model)

    def forward(self, x: Tensor) -> Any:
        x = x + attention(self.q_proj(x), self.k_proj(x), self.v_proj(x))
        x = self.norm(x + attention(*self.qkv_proj(x).chunk(3, dim=-1)))
        return self.layer(x)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return nn.functional.scaled_dot_product_attention(q, k, v)


@pytest.fixture
def dataloader() -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    return [(torch.randn(4, 5, d_model), torch.randn(4, 5, d_model)) for _ in range(3)]


def train(model: nn.Module, dataloader: list[tuple[Tensor, Tensor]]) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    # Training loop
    for batch in dataloader * 5:
        loss = nn.functional.mse_loss(model(batch[0]), batch[1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def pretrained(path: Path) -> Path:
    """What a model without LoRA would have saved."""
    torch.manual_seed(1)
    torch.save({n: t for n, t in BigModel().state_dict().items() if "lora_" not in n}, path)
    return path


@pytest.mark.parametrize("bias", ["none", "lora_only", "all"])
def test_mark_train_save_and_load(bias: Any, tmp_path: Path, dataloader: list[tuple[Tensor, Tensor]]) -> None:
    ckpt_pretrained, checkpoint_path = pretrained(tmp_path / "ckpt_pretrained.pt"), tmp_path / "ckpt_lora.pt"
    model = BigModel()
    model.load_state_dict(torch.load(ckpt_pretrained), strict=False)
    start = {n: t.clone() for n, t in model.state_dict().items()}
    if bias == "none":
        # This sets requires_grad to False for all parameters without the string "lora_" in their names
        lora.mark_only_lora_as_trainable(model)
    elif bias == "lora_only":
        # Training all bias vectors associated with modules we apply LoRA to
        lora.mark_only_lora_as_trainable(model, bias="lora_only")
    else:
        # Alternatively, we can train *all* bias vectors in the model, including LayerNorm biases
        lora.mark_only_lora_as_trainable(model, bias="all")
    losses = train(model, dataloader)
    assert sum(losses[-3:]) < sum(losses[:3])

    # ===== Before =====
    # torch.save(model.state_dict(), checkpoint_path)
    # ===== After =====
    if bias == "none":
        torch.save(lora.lora_state_dict(model), checkpoint_path)
    else:
        # When saving a checkpoint, use the same bias= ('all' or 'lora_only')
        torch.save(lora.lora_state_dict(model, bias=bias), checkpoint_path)
    moved = {n for n, t in model.state_dict().items() if not torch.equal(t, start[n])}
    saved = set(torch.load(checkpoint_path, weights_only=True))
    assert moved <= saved, "what was trained was not saved"
    adapted = {"layer.bias", "q_proj.bias", "v_proj.bias", "qkv_proj.bias"}
    biases = {"none": set(), "lora_only": adapted, "all": {*adapted, "k_proj.bias", "norm.bias"}}[bias]
    assert {name for name in saved if "lora_" not in name} == biases

    again = BigModel()
    # Load the pretrained checkpoint first
    again.load_state_dict(torch.load(ckpt_pretrained), strict=False)
    # Then load the LoRA checkpoint
    again.load_state_dict(torch.load(checkpoint_path), strict=False)
    assert torch.equal(again(dataloader[0][0]), model(dataloader[0][0]))


def test_eval_merges_train_undoes_it_and_merge_weights_false_keeps_apart() -> None:
    model = BigModel()
    nn.init.normal_(model.layer.lora_B)
    x, before = torch.randn(2, 3, d_model), model.layer.weight.detach().clone()
    expected = model(x)
    model.eval()
    assert model.layer.merged
    assert not torch.equal(model.layer.weight, before)
    torch.testing.assert_close(model(x), expected)
    model.train()
    assert torch.equal(model.layer.weight, before)
    assert torch.equal(model(x), expected)
    apart = lora.Linear(in_features, out_features, r=16, merge_weights=False)
    apart.eval()
    assert not apart.merged


def test_embeddings_and_convolutions_are_adapted_by_replacing_the_class() -> None:
    model = nn.Sequential(
        lora.Embedding(10, 4, r=2), nn.Unflatten(1, (1, -1)), lora.Conv2d(1, 2, 3, r=2, padding=1), nn.Flatten()
    )
    lora.mark_only_lora_as_trainable(model)
    model(torch.tensor([[1, 2, 3]])).sum().backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert trained == {"0.lora_A", "0.lora_B", "2.lora_A", "2.lora_B"}
