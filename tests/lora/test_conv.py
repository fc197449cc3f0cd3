"""Convolutions of every shape and setting, where loralib takes square Conv2d kernels alone."""

from __future__ import annotations

import itertools
from typing import Any

import loralib
import pytest
import torch
from torch import nn

from lora.lora_helpers import fill
from phinetune import lora

SETTINGS: list[dict[str, Any]] = [
    {},
    {"groups": 2},
    {"stride": 2},
    {"dilation": 2},
    {"padding": 1},
    {"padding": "same"},
    {"padding": 2, "padding_mode": "reflect"},
    {"padding": 1, "padding_mode": "circular", "bias": False},
    {"groups": 2, "stride": 2, "padding": 1, "dilation": 2},
]
KERNELS: list[tuple[str, Any, tuple[int, ...]]] = [
    ("Conv1d", 3, (9,)),
    ("Conv1d", 5, (11,)),
    ("Conv2d", (3, 2), (9, 8)),
    ("Conv2d", (1, 5), (7, 11)),
    ("Conv3d", 2, (5, 6, 4)),
    ("Conv3d", (1, 3, 2), (4, 7, 5)),
]
CASES = [pytest.param(*kernel, settings, id=f"{kernel[:2]}-{settings}") for kernel in KERNELS for settings in SETTINGS]


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize(("name", "kernel", "size", "settings"), CASES)
def test_it_is_torchs_convolution_with_the_kernel_plus_the_update(
    name: str, kernel: Any, size: tuple[int, ...], settings: dict[str, Any]
) -> None:
    settings = {**settings, "dtype": torch.float64}
    layer = fill(getattr(lora, name)(4, 6, kernel, r=2, lora_alpha=3, **settings))
    torch_layer = getattr(nn, name)(4, 6, kernel, **settings)
    missed = torch_layer.load_state_dict({n: t for n, t in layer.state_dict().items() if "lora_" not in n})
    assert not missed.missing_keys
    update = 1.5 * (layer.lora_B @ layer.lora_A).view(torch_layer.weight.shape)
    x = torch.randn(2, 4, *size, dtype=torch.float64)
    expected = torch_layer._conv_forward(x, torch_layer.weight + update, torch_layer.bias)
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(layer.eval()(x), expected)
    assert layer.train()(x[0]).shape == expected.shape[1:]


@pytest.mark.parametrize(("name", "kernel", "size"), KERNELS)
def test_both_adapters_learn(name: str, kernel: Any, size: tuple[int, ...]) -> None:
    layer = fill(getattr(lora, name)(4, 6, kernel, r=2, groups=2, dtype=torch.float64))
    x = torch.randn(1, 4, *size, dtype=torch.float64, requires_grad=True)
    names = ("lora_A", "lora_B")

    def run(x: torch.Tensor, *adapters: torch.Tensor) -> Any:
        return torch.func.functional_call(layer, dict(zip(names, adapters, strict=True)), (x,))

    assert torch.autograd.gradcheck(run, (x, layer.lora_A, layer.lora_B), fast_mode=True)


@pytest.mark.parametrize(("name", "size"), [("Conv1d", (9,)), ("Conv3d", (5, 5, 5))])
def test_loralib_fails_at_kernels_wider_than_1_but_for_conv2d(name: str, size: tuple[int, ...]) -> None:
    """loralib's issue #115."""
    layer = getattr(loralib, name)(4, 6, 3, r=2)
    with pytest.raises(RuntimeError, match="invalid for input of size"):
        layer(torch.randn(2, 4, *size))
    with pytest.raises(RuntimeError, match="invalid for input of size"):
        layer.eval()


def test_loralib_fails_at_kernels_that_are_rectangles() -> None:
    with pytest.raises(AssertionError):
        loralib.Conv2d(4, 6, (3, 2), r=2)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_groups_are_loralibs(groups: int) -> None:
    """loralib's releases before 0.1.1 fail (#67); 0.1.2 does not."""
    ours, theirs = fill(lora.Conv2d(4, 8, 3, r=2, groups=groups)), loralib.Conv2d(4, 8, 3, r=2, groups=groups)
    ours.load_state_dict(fill(theirs).state_dict())
    x = torch.randn(2, 4, 6, 6)
    torch.testing.assert_close(ours(x), theirs(x))


def test_square_kernels_given_as_a_tuple_have_loralibs_shapes() -> None:
    ours, theirs = lora.Conv2d(4, 6, (3, 3), r=2), loralib.Conv2d(4, 6, 3, r=2)
    assert ours.lora_A.shape == theirs.lora_A.shape
    assert ours.lora_B.shape == theirs.lora_B.shape


@pytest.mark.parametrize("attributes", list(itertools.product(["block", "conv"], repeat=2)))
def test_loralibs_names_are_understood_at_any_depth(attributes: tuple[str, str]) -> None:
    """Also where the model itself calls its layers `conv`."""

    def make(source: Any, seed: int) -> nn.Module:
        model, inner = nn.Module(), nn.Module()
        setattr(inner, attributes[1], source.Conv2d(2, 2, 3, r=1))
        inner.pointwise = nn.Conv2d(2, 2, 1)
        setattr(model, attributes[0], inner)
        return fill(model, seed)  # type: ignore[no-any-return]

    theirs, ours = make(loralib, 0), make(lora, 1)
    ours.load_state_dict(theirs.state_dict())
    mine = dict(ours.named_parameters())
    last = attributes[1]
    renamed = {name.replace(f".{last}.conv.", f".{last}."): p for name, p in theirs.named_parameters()}
    assert [name for name, parameter in renamed.items() if not torch.equal(mine[name], parameter)] == []
    fill(theirs, 2)
    lora.load_lora_state_dict(ours, loralib.lora_state_dict(theirs, "all"))
    found, wanted = lora.lora_state_dict(ours, "all"), loralib.lora_state_dict(theirs, "all")
    assert found.keys() == wanted.keys()
    assert [name for name, tensor in found.items() if not torch.equal(tensor, wanted[name])] == []
