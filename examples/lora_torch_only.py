"""LoRA on any torch model: a small classifier learns one task, then adapts to a shifted one through LoRA alone.

Shows `phinetune.lora`, which has loralib's names:
  1. pretrain a plain convolutional classifier: which of six shapes is in a noisy 16 × 16 picture?
  2. the task shifts: the pictures come upside down and as negatives, and the classifier fails
  3. put LoRA into the pretrained model, mark what trains, and train: about a seventh as many weights
  4. save LoRA alone; load it over the pretrained weights, with `strict=False`, in a fresh model
  5. `eval()` merges the update into the weights; `train()` takes it out again, to the bit
  6. unload to a plain torch model: no LoRA layer left, the same answers

Needs torch and phinetune; no data, no graphics card. Takes about ten seconds on two CPU cores.

    python examples/lora_torch_only.py
"""

from __future__ import annotations

import tempfile
from collections import OrderedDict
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import phinetune.lora as lora

SIZE = 16
LAYERS = ["conv1", "conv2", "hidden", "head"]
RANK, ALPHA = 4, 8


def shapes() -> Tensor:
    """The six shapes, (6, SIZE, SIZE), none of which looks the same upside down."""
    i, j = torch.meshgrid(torch.arange(10), torch.arange(10), indexing="ij")
    drawn = [
        j <= i,  # a triangle
        (j < 3) | (i > 6),  # an L
        ((i - j).abs() < 2) | ((i < 3) & (j < 6)),  # an arrow
        (i < 3) | ((j - 4).abs() < 2),  # a T
        (j > 6) | ((i > 6) & (j > 2)),  # a hook
        (i < 3) | ((i > 4) & (i < 7) & (j < 6)) | (j < 2),  # an F
    ]
    return torch.stack([F.pad(one.float(), (0, SIZE - 10, 0, SIZE - 10)) for one in drawn])


def pictures(count: int, seed: int, shifted: bool = False) -> tuple[Tensor, Tensor]:
    """Noisy pictures (count, 1, SIZE, SIZE) of shapes at random places, and which shape each shows (count).

    Args:
        shifted: upside down and as negatives.
    """
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(6, (count,), generator=generator)
    places = torch.randint(SIZE - 9, (count, 2), generator=generator).tolist()
    drawn = shapes()
    clean = torch.stack([drawn[k].roll((i, j), dims=(0, 1)) for k, (i, j) in zip(labels.tolist(), places, strict=True)])
    if shifted:
        clean = 1 - clean.flip(1)
    noisy = clean + 0.5 * torch.randn(clean.shape, generator=generator)
    return noisy.unsqueeze(1), labels


def make_model() -> nn.Sequential:
    """The classifier, in plain torch."""
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(1, 16, 3, padding=1),
            relu1=nn.ReLU(),
            pool1=nn.MaxPool2d(2),
            conv2=nn.Conv2d(16, 32, 3, padding=1),
            relu2=nn.ReLU(),
            pool2=nn.MaxPool2d(2),
            flat=nn.Flatten(),
            hidden=nn.Linear(512, 64),
            relu3=nn.ReLU(),
            head=nn.Linear(64, 6),
        )
    )


def train(model: nn.Module, data: tuple[Tensor, Tensor], learning_rate: float, steps: int = 400) -> None:
    """Train whatever requires a gradient."""
    x, labels = data
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate)
    generator = torch.Generator().manual_seed(0)
    model.train()
    for _ in range(steps):
        batch = torch.randint(len(x), (64,), generator=generator)
        loss = F.cross_entropy(model(x[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@torch.no_grad()
def accuracy(model: nn.Module, data: tuple[Tensor, Tensor]) -> float:
    """The part of the pictures that the model names rightly."""
    x, labels = data
    return (model.eval()(x).argmax(dim=1) == labels).float().mean().item()


def parameters(model: nn.Module, trained: bool = False) -> int:
    """How many weights there are, or train."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trained)


def main(folder: Path) -> None:
    """The six steps; files go to `folder`."""
    torch.manual_seed(0)
    first_task, shifted_task = pictures(4000, seed=1), pictures(4000, seed=2, shifted=True)
    first_test, shifted_test = pictures(1000, seed=3), pictures(1000, seed=4, shifted=True)

    print("1. Pretrain on the first task")
    model = make_model()
    train(model, first_task, learning_rate=3e-3)
    torch.save(model.state_dict(), folder / "pretrained.pt")
    learned = accuracy(model, first_test)
    print(f"   accuracy on the first task: {learned:.1%}")

    print("2. The task shifts")
    lost = accuracy(model, shifted_test)
    print(f"   accuracy on the shifted task: {lost:.1%} (guessing: {1 / 6:.1%})")

    print("3. Adapt with LoRA")
    all_weights = parameters(model)
    lora.apply(model, LAYERS, r=RANK, lora_alpha=ALPHA)
    lora.mark_only_lora_as_trainable(model)
    lora_weights = parameters(model, trained=True)
    print(f"   {lora_weights:,} weights train, {lora_weights / all_weights:.0%} of the model's {all_weights:,}")
    train(model, shifted_task, learning_rate=1e-2)
    adapted = accuracy(model, shifted_test)
    print(f"   accuracy on the shifted task: {adapted:.1%}")

    print("4. Save LoRA alone, and load it over the pretrained weights in a fresh model")
    torch.save(lora.lora_state_dict(model), folder / "lora.pt")
    whole_size, lora_size = ((folder / name).stat().st_size for name in ("pretrained.pt", "lora.pt"))
    print(f"   pretrained.pt {whole_size / 1024:.0f} KiB, lora.pt {lora_size / 1024:.0f} KiB")
    fresh = make_model()
    lora.apply(fresh, LAYERS, r=RANK, lora_alpha=ALPHA)
    fresh.load_state_dict(torch.load(folder / "pretrained.pt", weights_only=True), strict=False)
    fresh.load_state_dict(torch.load(folder / "lora.pt", weights_only=True), strict=False)

    print("5. eval() merges, train() takes the update out again")
    x = shifted_test[0]
    pretrained_weight = fresh.hidden.weight.clone()
    with torch.no_grad():
        apart = fresh(x)  # in training mode: the weight and its update side by side
        merged = fresh.eval()(x)
    merged_weight = fresh.hidden.weight.clone()
    restored_weight = fresh.train().hidden.weight.clone()
    print(f"   largest difference of an answer, merged or not: {(merged - apart).abs().max():.1e}")

    print("6. Unload to plain torch")
    plain = lora.unload(fresh).eval()
    print(f"   layers: {', '.join(type(plain.get_submodule(name)).__name__ for name in LAYERS)}")
    with torch.no_grad():
        unloaded = plain(x)

    # What all this was to show:
    assert learned > 0.9, "the first task was learned"
    assert lost < 0.5, "the shifted task is another one"
    assert adapted > 0.9, "LoRA alone learned the shifted task"
    assert lora_weights < all_weights / 5, "few weights did it"
    assert lora_size < whole_size / 3, "and they make a small file"
    assert torch.allclose(merged, apart, atol=1e-4), "merging changes no answer"
    assert not torch.equal(merged_weight, pretrained_weight), "though it changes the weight"
    assert torch.equal(restored_weight, pretrained_weight), "and train() brings that back to the bit"
    assert torch.equal(unloaded, merged), "the plain model answers as the merged one"
    assert accuracy(plain, shifted_test) == adapted, "as well as the model that was trained"
    assert not any(isinstance(layer, lora.LoRALayer) for layer in plain.modules()), "no LoRA layer is left"
    assert plain.state_dict().keys() == make_model().state_dict().keys(), "so any torch code can load its weights"
    part = lora_weights / all_weights
    print(f"All as said: {lost:.1%} before LoRA, {adapted:.1%} after, with {part:.0%} of the weights")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        main(Path(temporary))
