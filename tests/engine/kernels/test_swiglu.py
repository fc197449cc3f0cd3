"""SwiGLU and its gradient are those of `silu(gate) · up`, and its input alone is kept."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from phinetune.engine.kernels.swiglu import _backward_to_compile, swiglu

SHAPES = [(5, 12), (1, 2), (2, 3, 8), (6,)]
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def reference(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def draw(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    torch.manual_seed(0)
    return (2 * torch.randn(shape, dtype=torch.float64)).to(dtype).requires_grad_()


@each_shape
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_outputs_and_gradients_are_those_of_torch(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = draw(shape, dtype)
    found, wanted = swiglu(x), reference(x)
    torch.testing.assert_close(found, wanted)
    grad = torch.randn(found.shape, dtype=torch.float64).to(dtype)
    (ours,), (theirs,) = (torch.autograd.grad(out, x, grad) for out in (found, wanted))
    assert ours.dtype == dtype
    torch.testing.assert_close(ours, theirs)


@each_shape
def test_gradcheck(shape: tuple[int, ...]) -> None:
    assert torch.autograd.gradcheck(swiglu, (draw(shape, torch.float64),))


@each_shape
def test_the_compilers_formula_is_the_same_gradient(shape: tuple[int, ...]) -> None:
    x = draw(shape, torch.float64)
    grad = torch.randn(*shape[:-1], shape[-1] // 2, dtype=torch.float64)
    torch.testing.assert_close(_backward_to_compile(grad, x), *torch.autograd.grad(reference(x), x, grad))


def test_rows_are_taken_a_part_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("phinetune.engine.kernels.chunks.MAX_ELEMENTS", 2 * 12)  # two rows, two, one
    test_outputs_and_gradients_are_those_of_torch((5, 12), torch.float64)


def test_strided_inputs_and_gradients_pass() -> None:
    x = draw((8, 5), torch.float64)
    assert torch.autograd.gradcheck(lambda t: swiglu(t.t()).t(), (x,))


def test_large_values_saturate() -> None:
    x = torch.tensor([[-1e4, 1e4, 2.0, 3.0]], requires_grad=True)
    out = swiglu(x)
    out.sum().backward()
    assert out.tolist() == [[0.0, 3e4]]
    assert x.grad is not None
    assert x.grad.tolist() == [[0.0, 3.0, 0.0, 1e4]]


def test_the_input_is_kept_alone_and_unchanged() -> None:
    x = draw((5, 12), torch.float32)
    before = x.detach().clone()
    out = swiglu(x)
    out.sum().backward()
    assert torch.equal(x, before)
    out = swiglu(x)
    assert out.grad_fn is not None
    assert [t.data_ptr() for t in out.grad_fn.saved_tensors] == [x.data_ptr()]
