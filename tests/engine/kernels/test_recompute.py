"""A tensor that a backward would keep dies with the forward and is computed again, to the bit."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable

import torch
from torch import Tensor, nn

from phinetune.engine.kernels.norm import rms_norm
from phinetune.engine.kernels.recompute import recomputed


def leaf(*shape: int) -> Tensor:
    torch.manual_seed(sum(shape))
    return torch.randn(*shape, requires_grad=True)


class Counted:
    """A recipe that notes each time it is used."""

    def __init__(self, recipe: Callable[[], Tensor]) -> None:
        self.recipe, self.calls = recipe, 0

    def __call__(self) -> Tensor:
        assert not torch.is_grad_enabled()
        self.calls += 1
        return self.recipe()


def product(x: Tensor, weight: Tensor, rebuild: bool) -> tuple[Tensor, weakref.ref[Tensor], Counted]:
    """sin(x) · weight, whose backward would keep sin(x)."""
    made = x.sin()
    recipe = Counted(functools.partial(torch.sin, x.detach()))
    if rebuild:
        with recomputed(made, recipe):
            out = made @ weight
    else:
        out = made @ weight
    return out, weakref.ref(made), recipe


def test_the_tensor_dies_and_the_gradients_are_equal_to_the_bit() -> None:
    x, weight = leaf(6, 4), leaf(4, 3)
    kept, alive, _ = product(x, weight, rebuild=False)
    assert alive() is not None
    light, dead, recipe = product(x, weight, rebuild=True)
    assert dead() is None
    assert torch.equal(light, kept)
    grad = torch.randn(6, 3)
    wanted = torch.autograd.grad(kept, (x, weight), grad)
    assert recipe.calls == 0
    found = torch.autograd.grad(light, (x, weight), grad)
    assert recipe.calls == 1
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_other_tensors_are_left_alone() -> None:
    x, weight, other = leaf(6, 4), leaf(4, 4), leaf(6, 4)
    made = x.sin()
    recipe = Counted(functools.partial(torch.full, (6, 4), float("nan")))
    with recomputed(made, recipe):
        beside = other.cos() @ weight
        turned = made.t() @ other  # keeps a view of other strides
        part = made[:5].square()  # of another shape
    again = x.sin()
    outs = other.cos() @ weight, again.t() @ other, again[:5].square()
    wanted = torch.autograd.grad(outs[0].sum() + outs[1].sum() + outs[2].sum(), (x, other, weight))
    found = torch.autograd.grad(beside.sum() + turned.sum() + part.sum(), (x, other, weight))
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert recipe.calls == 0


def test_what_is_saved_outside_the_block_is_kept() -> None:
    x, weight = leaf(6, 4), leaf(4, 3)
    made = x.sin()
    recipe = Counted(functools.partial(torch.sin, x.detach()))
    before = made @ weight
    with recomputed(made, recipe):
        inside = made @ weight
    after = made @ weight
    torch.autograd.grad(before.sum() + after.sum(), weight)
    assert recipe.calls == 0
    torch.autograd.grad(inside.sum(), weight)
    assert recipe.calls == 1


def test_every_place_that_saved_it_calls_the_recipe() -> None:
    x, first, second = leaf(6, 4), leaf(4, 3), leaf(4, 2)
    made = x.sin()
    recipe = Counted(functools.partial(torch.sin, x.detach()))
    with recomputed(made, recipe):
        outs = made @ first, made @ second
    found = torch.autograd.grad([out.sum() for out in outs], (x, first, second))
    assert recipe.calls == 2
    wanted = torch.autograd.grad((x.sin() @ first).sum() + (x.sin() @ second).sum(), (x, first, second))
    torch.testing.assert_close(found, wanted)


def test_a_linear_layer_after_a_norm_trains_as_before() -> None:
    torch.manual_seed(0)
    x, scale, layer = leaf(6, 4), leaf(4), nn.Linear(4, 3)
    leaves = [x, scale, *layer.parameters()]

    def run(rebuild: bool) -> tuple[Tensor, weakref.ref[Tensor]]:
        normed = rms_norm(x, scale, 1e-5)
        if not rebuild:
            return layer(normed), weakref.ref(normed)
        with recomputed(normed, functools.partial(rms_norm, x.detach(), scale, 1e-5)):
            return layer(normed), weakref.ref(normed)

    (light, dead), (kept, alive) = run(True), run(False)
    assert dead() is None
    assert alive() is not None
    found, wanted = (torch.autograd.grad(out.square().sum(), leaves) for out in (light, kept))
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_a_block_without_a_backward_calls_nothing() -> None:
    x, weight = leaf(6, 4), leaf(4, 3)
    with torch.no_grad():
        out, dead, recipe = product(x, weight, rebuild=True)
    assert dead() is None
    assert recipe.calls == 0
    assert torch.equal(out, x.detach().sin() @ weight.detach())
