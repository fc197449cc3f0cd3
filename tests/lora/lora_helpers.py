"""Pairs of layers, loralib's and ours, on the same weights; and what to compare between them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import loralib
import torch
from torch import Tensor, nn

from phinetune import lora


@dataclass(frozen=True)
class Kind:
    """A layer that loralib can make, and shapes of inputs that it takes."""

    name: str
    args: tuple[Any, ...]
    shapes: tuple[tuple[int, ...], ...]
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return "-".join([self.name, *(f"{k}={v}" for k, v in self.options.items() if k not in ("r", "lora_alpha"))])

    def theirs(self, **options: Any) -> Any:
        return fill(getattr(loralib, self.name)(*self.args, **{**self.options, **options}))

    def ours(self, **options: Any) -> Any:
        return fill(getattr(lora, self.name)(*self.args, **{**self.options, **options}))

    def pair(self, **options: Any) -> tuple[Any, Any]:
        """Ours and loralib's with the same weights, adapters and bias."""
        theirs, ours = self.theirs(**options), self.ours(**options)
        ours.load_state_dict(theirs.state_dict())
        return ours, theirs

    def input(self, shape: tuple[int, ...] | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
        shape = self.shapes[-1] if shape is None else shape
        generator = torch.Generator().manual_seed(3)
        if self.name == "Embedding":
            return torch.randint(self.args[0], shape, generator=generator)
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


LINEAR_SHAPES = ((7,), (2, 7), (2, 3, 7), (2, 1, 3, 7))
RANK = {"r": 3, "lora_alpha": 4}
QKV = [True, False, True]

LINEARS = [
    Kind("Linear", (7, 5), LINEAR_SHAPES, RANK),
    Kind("Linear", (7, 5), LINEAR_SHAPES, {**RANK, "bias": False}),
    Kind("Linear", (7, 5), LINEAR_SHAPES, {**RANK, "fan_in_fan_out": True}),
]
MERGED_LINEARS = [
    Kind("MergedLinear", (7, 15), LINEAR_SHAPES, {**RANK, "enable_lora": QKV}),
    Kind("MergedLinear", (7, 15), LINEAR_SHAPES, {**RANK, "enable_lora": [False, True, False], "bias": False}),
    Kind("MergedLinear", (7, 15), LINEAR_SHAPES, {**RANK, "enable_lora": [True, True, True]}),
    Kind("MergedLinear", (7, 15), LINEAR_SHAPES, {**RANK, "enable_lora": QKV, "fan_in_fan_out": True}),
]
EMBEDDINGS = [
    Kind("Embedding", (11, 5), ((4,), (2, 3), ()), RANK),
    Kind("Embedding", (11, 5), ((4,), (3, 9)), {**RANK, "scale_grad_by_freq": True}),
]
CONVOLUTIONS = [
    Kind("Conv2d", (4, 6, 3), ((4, 7, 8), (2, 4, 7, 8)), RANK),
    Kind("Conv2d", (4, 6, 3), ((2, 4, 9, 8),), {**RANK, "stride": 2, "padding": (1, 2), "dilation": 2, "bias": False}),
    Kind("Conv2d", (4, 6, 3), ((2, 4, 7, 8),), {**RANK, "groups": 2, "padding": 1, "padding_mode": "circular"}),
    Kind("Conv1d", (4, 6, 1), ((4, 5), (2, 4, 5)), RANK),
    Kind("Conv3d", (4, 6, 1), ((4, 3, 2, 5), (2, 4, 3, 2, 5)), RANK),
]
ALL = [*LINEARS, *MERGED_LINEARS, *EMBEDDINGS, *CONVOLUTIONS]
ONE_OF_EACH = [LINEARS[0], MERGED_LINEARS[0], EMBEDDINGS[0], CONVOLUTIONS[0], *CONVOLUTIONS[3:]]


def fill(layer: Any, seed: int = 0) -> Any:
    """Random numbers in every parameter, B's as well (it starts at zero)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        # By name: loralib registers a convolution's parameters in another order.
        for _, parameter in sorted(layer.named_parameters(), key=lambda pair: pair[0].replace("conv.", "")):
            values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / 2
            parameter.copy_(values)
    return layer


def gradients(layer: nn.Module, x: Tensor, autocast: bool = False) -> dict[str, Tensor]:
    """The output and the gradients of all parameters that train and of the input, by name.

    With `autocast` the forward runs in bfloat16, and the backward outside of it, as torch asks.
    """
    layer.zero_grad()
    x = x.detach().clone().requires_grad_(x.is_floating_point())
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        out = layer(x)
    generator = torch.Generator().manual_seed(5)
    out.backward(torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.dtype))
    found = {"output": out.detach()}
    found |= {n.removeprefix("conv."): p.grad.clone() for n, p in layer.named_parameters() if p.grad is not None}
    return found if x.grad is None else {**found, "input": x.grad}


def assert_close(ours: Tensor, theirs: Tensor, relative: float = 1e-6, what: str = "") -> None:
    """Equal to `relative` of the largest number."""
    assert ours.shape == theirs.shape, what
    assert ours.dtype == theirs.dtype, what
    error, size = (ours - theirs).abs().max().item(), theirs.abs().max().item()
    assert error <= relative * size, f"{what}: off by {error} of {size}"


def assert_all_close(ours: dict[str, Tensor], theirs: dict[str, Tensor], relative: float = 1e-6) -> None:
    assert ours.keys() == theirs.keys()
    for name in theirs:
        assert_close(ours[name], theirs[name], relative, name)


class Block(nn.Module):
    """A model with an embedding, a convolution and linear layers of loralib or of ours, and with torch's own head."""

    def __init__(self, source: Any) -> None:
        super().__init__()
        self.embed = source.Embedding(10, 8, r=2)
        self.conv = source.Conv2d(1, 1, 3, r=2, padding=1)
        self.qkv = source.MergedLinear(8, 24, r=2, lora_alpha=4, enable_lora=QKV)
        self.norm = nn.LayerNorm(8)
        self.out = source.Linear(8, 8, r=2)
        self.head = nn.Linear(8, 3)
        fill(self)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        x = x + self.conv(x.unsqueeze(1)).squeeze(1)
        q, k, v = self.qkv(self.norm(x)).chunk(3, dim=-1)
        mixed: Tensor = torch.softmax(q @ k.transpose(-1, -2), dim=-1) @ v
        logits: Tensor = self.head(x + self.out(mixed))
        return logits


IDS = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 9]])
