"""Base and adapter as one product give what two passes give, rounded once, and never mix adapters up."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from phinetune.lora import one_product
from phinetune.lora.functional import Projection, lora_linear

BF16 = torch.bfloat16
NAMES = ("output", "x", "A", "B")


def made(rows: int, inner: int, out: int, rank: int, dtype: torch.dtype = torch.float32, bias: bool = False) -> Any:
    """A layer, and x, A and B. All are numbers that bfloat16 holds."""
    torch.manual_seed(0)
    layer = nn.Linear(inner, out, bias=bias).requires_grad_(False).to(BF16).to(dtype)
    given = [torch.randn(shape).to(BF16).to(dtype) for shape in ((rows, inner), (rank, inner), (out, rank))]
    return layer, *given


def results(layer: nn.Linear, x: Tensor, a: Tensor, b: Tensor, scaling: float = 0.75) -> dict[str, Tensor]:
    """The output, and the gradients of x, A and B for some gradient of it."""
    leaves = [one.clone().requires_grad_() for one in (x, a, b)]
    out = lora_linear(leaves[0], layer.weight, layer.bias, *leaves[1:], scaling)
    torch.manual_seed(1)
    out.backward(torch.randn(out.shape).to(BF16).to(x.dtype))
    return dict(zip(NAMES, (out.detach(), *(one.grad for one in leaves)), strict=True))


def truth(layer: nn.Linear, x: Tensor, a: Tensor, b: Tensor, scaling: float = 0.75) -> dict[str, Tensor]:
    """The same by the formula, in float64."""
    leaves = [one.double().requires_grad_() for one in (x, a, b)]
    bias = None if layer.bias is None else layer.bias.double()
    out = F.linear(leaves[0], layer.weight.double(), bias)
    out = out + scaling * F.linear(F.linear(leaves[0], leaves[1]), leaves[2])
    torch.manual_seed(1)
    out.backward(torch.randn(out.shape).to(BF16).double())
    return dict(zip(NAMES, (out.detach(), *(one.grad for one in leaves)), strict=True))  # type: ignore[arg-type]


def far(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("more", [0, 3], ids=["", "room for more"])
@pytest.mark.parametrize(("rows", "inner", "out", "rank"), [(1, 33, 70, 1), (97, 48, 31, 64), (130, 7, 5, 4)])
def test_it_is_the_formula(rows: int, inner: int, out: int, rank: int, more: int, bias: bool) -> None:
    layer, *given = made(rows, inner, out, rank, bias=bias)
    one_product.make_room(layer, rank + more)
    found, wanted = results(layer, *given), truth(layer, *given)
    for name in NAMES:
        assert far(found[name], wanted[name]) < 1e-6, name


@pytest.mark.parametrize(("rows", "inner", "out", "rank"), [(64, 33, 70, 1), (97, 48, 31, 16), (2600, 7, 5, 4)])
def test_in_bfloat16_it_is_no_farther_from_the_formula_than_two_passes(
    rows: int, inner: int, out: int, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("phinetune.engine.kernels.matmul.is_slower_than_float32", lambda dtype: False)
    layer, *given = made(rows, inner, out, rank, BF16)
    wanted, two = truth(layer, *given, 2.0), results(layer, *given, 2.0)
    one_product.make_room(layer, rank)
    one = results(layer, *given, 2.0)
    assert not torch.equal(one["output"], two["output"])
    for name in NAMES:
        assert far(one[name], wanted[name]) < 1.02 * far(two[name], wanted[name]), name


def test_more_rows_than_are_multiplied_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, *given = made(50, 12, 9, 4)
    monkeypatch.setattr("phinetune.engine.kernels.matmul.MAX_ROWS", 16)
    one_product.make_room(layer, 4)
    found, wanted = results(layer, *given), truth(layer, *given)
    assert all(far(found[name], wanted[name]) < 1e-6 for name in NAMES)


def test_adapters_of_unlike_rank_on_one_base_do_not_mix() -> None:
    """As two of them on one base in one step: both forwards come before both backwards."""
    layer, x, a, b = made(20, 12, 9, 4)
    _, _, other_a, other_b = made(20, 12, 9, 2)
    one_product.make_room(layer, 4)
    pairs = [(a, b, 0.5), (other_a + 1, other_b - 1, 2.0)]
    leaves = [[one.clone().requires_grad_() for one in (x, one_a, one_b)] for one_a, one_b, _ in pairs]
    outs = [lora_linear(lx, layer.weight, None, la, lb, s) for (lx, la, lb), (*_, s) in zip(leaves, pairs, strict=True)]
    torch.manual_seed(1)
    grad = torch.randn(20, 9).to(BF16).float()
    for out in outs:
        out.backward(grad)
    for out, found, (one_a, one_b, scaling) in zip(outs, leaves, pairs, strict=True):
        wanted = truth(layer, x, one_a, one_b, scaling)
        for name, value in zip(NAMES, (out.detach(), *(leaf.grad for leaf in found)), strict=True):
            assert value is not None
            assert far(value, wanted[name]) < 1e-6, name


def test_an_adapter_that_has_changed_is_seen() -> None:
    layer, x, a, b = made(20, 12, 9, 4)
    one_product.make_room(layer, 4)
    results(layer, x, a, b)
    found, wanted = results(layer, x, 2 * a, b + 1), truth(layer, x, 2 * a, b + 1)
    assert all(far(found[name], wanted[name]) < 1e-6 for name in NAMES)


def test_a_rank_without_room_and_dropout_take_two_passes() -> None:
    layer, x, a, b = made(20, 12, 9, 8)
    one_product.make_room(layer, 4)
    assert Projection(layer.weight, None, 9, a, b, 1.0).room == 0
    found, wanted = results(layer, x, a, b), truth(layer, x, a, b)
    assert all(far(found[name], wanted[name]) < 1e-6 for name in NAMES)
    one_product.make_room(layer, 8)
    assert Projection(layer.weight, None, 9, a, b, 1.0).room == 8
    torch.testing.assert_close(
        lora_linear(x, layer.weight, None, a, b, 1.0, adapter_input=2 * x), x @ layer.weight.T + 2 * x @ a.T @ b.T
    )


def test_a_layer_with_room_computes_saves_and_gives_back_what_it_did() -> None:
    layer, x, *_ = made(20, 12, 9, 4, bias=True)
    before, wanted = layer.weight.clone(), layer(x)
    assert one_product.room_of(layer.weight) == 0
    one_product.make_room(layer, 4)
    at = layer.weight.data_ptr()
    one_product.make_room(layer, 3)  # there is more already
    assert (one_product.room_of(layer.weight), layer.weight.data_ptr()) == (4, at)
    assert not layer.weight.requires_grad
    torch.testing.assert_close(layer(x), wanted)
    assert torch.equal(layer.state_dict()["weight"], before)
    one_product.take_room(layer)
    assert layer.weight.is_contiguous()
    assert one_product.room_of(layer.weight) == 0
    assert torch.equal(layer.weight, before)


def test_other_weights_have_no_room() -> None:
    wide = torch.zeros(9, 16)
    for weight in (wide, wide[:, :12], wide[:5, :12], wide[1:6, :12], wide.t()):
        assert one_product.room_of(weight) == 0
    layer = nn.Linear(12, 5).requires_grad_(False)
    layer.weight.data = wide[:5, :12]  # of the form that a weight with room has, but the rest of `wide` is not ours
    results(layer, torch.ones(3, 12), torch.ones(4, 12), torch.ones(5, 4))
    assert not wide.any()
    layer = nn.Linear(4, 4)
    with pytest.raises(ValueError, match="trains"):
        one_product.make_room(layer, 2)
