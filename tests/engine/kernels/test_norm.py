"""The norm is transformers' norm, and its gradients are autograd's of the formula."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.phi3.modeling_phi3 import Phi3RMSNorm

from phinetune.engine.kernels.norm import add_rms_norm, rms_norm

SHAPES = [(5, 12), (1, 12), (2, 3, 12), (4, 1)]
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def leaves(shape: tuple[int, ...], dtype: torch.dtype, trains: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """x, the weight and a gradient of the output."""
    torch.manual_seed(len(shape))
    x, grad = (3 * torch.randn(shape)).to(dtype), torch.randn(shape).to(dtype)
    weight = (1 + torch.randn(shape[-1])).to(dtype)
    return x.requires_grad_(), weight.requires_grad_(trains), grad


def by_transformers(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    norm = Phi3RMSNorm(len(weight), eps).to(weight.dtype)
    norm.weight = torch.nn.Parameter(weight, requires_grad=weight.requires_grad)
    return torch.func.functional_call(norm, {"weight": weight}, (x,))  # type: ignore[no-any-return]


def reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight * x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


@each_shape
@pytest.mark.parametrize("eps", [1e-6, 1e-1])
def test_outputs_and_gradients_are_transformers(shape: tuple[int, ...], eps: float) -> None:
    x, weight, grad = leaves(shape, torch.float32)
    found, wanted = rms_norm(x, weight, eps), by_transformers(x, weight, eps)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
    ours, theirs = (torch.autograd.grad(out, (x, weight), grad) for out in (found, wanted))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@each_shape
def test_bfloat16_is_transformers_but_for_a_rounding(shape: tuple[int, ...]) -> None:
    x, weight, grad = leaves(shape, torch.bfloat16)
    found, wanted = rms_norm(x, weight, 1e-5), by_transformers(x, weight, 1e-5)
    assert found.dtype == torch.bfloat16
    # Two roundings of eight bits each, of which the first may fall to the other side.
    torch.testing.assert_close(found, wanted, rtol=2**-7, atol=0)
    ours = torch.autograd.grad(found, (x, weight), grad)
    exact = [leaf.detach().double().requires_grad_() for leaf in (x, weight)]
    theirs = torch.autograd.grad(reference(*exact, 1e-5), exact, grad.double())
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == torch.bfloat16
        torch.testing.assert_close(a.double(), b, rtol=0.03, atol=0.03)


@each_shape
def test_gradients_are_those_of_the_formula(shape: tuple[int, ...]) -> None:
    x, weight, grad = leaves(shape, torch.float32)
    exact = [leaf.detach().double().requires_grad_() for leaf in (x, weight)]
    theirs = torch.autograd.grad(reference(*exact, 1e-5), exact, grad.double())
    for a, b in zip(torch.autograd.grad(rms_norm(x, weight, 1e-5), (x, weight), grad), theirs, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-6)


def test_bfloat16_is_rounded_before_it_is_weighed_as_in_transformers() -> None:
    x, weight, _ = leaves((64, 96), torch.bfloat16)
    equal = rms_norm(x, weight, 1e-5) == by_transformers(x, weight, 1e-5)
    assert equal.double().mean() > 0.999  # the statistics may differ in their last bit
    once = (reference(x.double(), weight.double(), 1e-5)).bfloat16()
    assert (once == by_transformers(x, weight, 1e-5)).double().mean() < 0.9


def test_a_float32_weight_is_not_rounded_to_the_dtype_of_x() -> None:
    x, weight, grad = leaves((64, 96), torch.bfloat16)
    fine = (weight.detach().float() * 1.001).requires_grad_()
    out = rms_norm(x, fine, 1e-5)
    normed = rms_norm(x.detach(), torch.ones(96, dtype=torch.bfloat16), 1e-5)
    torch.testing.assert_close(out, (normed.float() * fine).bfloat16(), rtol=0, atol=0)
    dx, dw = torch.autograd.grad(out, (x, fine), grad)
    assert (out.dtype, dx.dtype, dw.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)


def test_a_frozen_weight_gets_no_gradient_and_changes_no_other() -> None:
    x, weight, grad = leaves((5, 12), torch.float32)
    both = torch.autograd.grad(rms_norm(x, weight, 1e-5), (x, weight), grad)
    (dx,) = torch.autograd.grad(rms_norm(x, weight.detach(), 1e-5), (x,), grad)
    (dw,) = torch.autograd.grad(rms_norm(x.detach(), weight, 1e-5), (weight,), grad)
    assert torch.equal(dx, both[0])
    assert torch.equal(dw, both[1])


def test_a_token_of_zeros_stays_finite() -> None:
    x = torch.zeros(2, 12, requires_grad=True)
    out = rms_norm(x, torch.ones(12), 1e-5)
    out.backward(torch.ones(2, 12))
    assert not out.any()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, torch.full((2, 12), 1e-5**-0.5))


def test_x_and_a_number_a_token_are_kept() -> None:
    x, weight, _ = leaves((2, 3, 12), torch.bfloat16)
    view = rms_norm(x, weight, 1e-5).grad_fn
    assert view is not None
    grad_fn: Any = view.next_functions[0][0]
    kept = grad_fn.saved_tensors
    assert sorted((t.shape, t.dtype) for t in kept) == sorted(
        [((6, 12), torch.bfloat16), ((12,), torch.bfloat16), ((6,), torch.float32)]
    )


# -- with the sum before it ---------------------------------------------------------------------------------------


@each_shape
def test_a_sum_and_its_norm_are_the_two_operators_one_after_the_other(shape: tuple[int, ...]) -> None:
    x, weight, grad = leaves(shape, torch.float32)
    residual = x.detach().flip(0).requires_grad_()
    found = add_rms_norm(x, residual, weight, 1e-5)
    total = x + residual
    wanted = total, by_transformers(total, weight, 1e-5)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
    grads = grad.flip(-1), grad  # of the sum and of the norm
    ours, theirs = (torch.autograd.grad(out, (x, residual, weight), grads) for out in (found, wanted))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_either_output_of_the_sum_may_go_unused_and_what_is_frozen_gets_no_gradient() -> None:
    x, weight, grad = leaves((5, 12), torch.float32, trains=False)
    for used in (0, 1):
        (dx,) = torch.autograd.grad(add_rms_norm(x, torch.ones(5, 12), weight, 1e-5)[used], x, grad)
        plain = x + 1 if used == 0 else by_transformers(x + 1, weight, 1e-5)
        torch.testing.assert_close(dx, torch.autograd.grad(plain, x, grad)[0], rtol=1e-5, atol=1e-6)


def test_in_bfloat16_the_norm_is_that_of_the_rounded_sum() -> None:
    x, weight, _ = leaves((64, 96), torch.bfloat16)
    total, out = add_rms_norm(x, x.detach() / 3, weight, 1e-5)
    assert torch.equal(total, x + x.detach() / 3)
    assert torch.equal(out, rms_norm(total, weight, 1e-5))
