"""Kernels for CUDA devices give what torch's forms give.

Those in Triton also run where there is no device, by Triton's interpreter, if Triton is installed. Flash attention does
not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.kernels.attention_cases import FORESTS, inputs, reference, table
from phinetune.engine.attention_plan import Contexts, Heads, contexts_run, grouped_run
from phinetune.engine.kernels import norm, rotary, swiglu
from phinetune.engine.kernels.attention import attention, planned
from phinetune.engine.kernels.native.operator import Operator
from phinetune.engine.segments import read_segments

pytestmark = pytest.mark.device

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1.6e-2}  # of float32 a few of its steps, of bfloat16 two
each_dtype = pytest.mark.parametrize("dtype", TOLERANCE, ids=["float32", "bfloat16"])
# One feature fills a program's block; 40 do not, and 1,030 take a second one of SwiGLU's, which they do not fill.
each_width = pytest.mark.parametrize("width", [1, 40, 1030])

on_gpu = pytest.mark.skipif(not GPU, reason="flash attention needs a CUDA device")


@pytest.fixture(scope="module")
def forms() -> dict[str, Callable[..., Any]]:
    """The kernels in Triton."""
    pytest.importorskip("triton", reason="Triton is not installed")
    from phinetune.engine.kernels.triton_forms import FORMS

    return FORMS


def drawn(dtype: torch.dtype, *shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=generator).to(DEVICE, dtype) for shape in shapes]


def assert_same(form: Callable[..., Any], operator: Operator, *arguments: Any) -> None:
    """Both forms leave the same in all tensors that they were given."""
    given = [[one.clone() if isinstance(one, Tensor) else one for one in arguments] for _ in range(2)]
    form(*given[0])
    operator.by_torch(*given[1])
    tolerance = TOLERANCE[arguments[0].dtype]
    for found, wanted in zip(*given, strict=True):
        if isinstance(found, Tensor):
            torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)


@each_dtype
@each_width
@pytest.mark.parametrize("adds", [False, True], ids=["alone", "after a sum"])
def test_rms_norm(forms: dict[str, Any], dtype: torch.dtype, width: int, adds: bool) -> None:
    x, residual, weight, out, total = drawn(dtype, (5, width), (5, width), (width,), (5, width), (5, width))
    scale = torch.zeros(5, device=DEVICE)
    sums = (residual, total) if adds else (None, None)
    assert_same(forms["rms_norm"], norm._forward, x, sums[0], weight, 1e-5, out, scale, sums[1])


@each_dtype
@each_width
@pytest.mark.parametrize("adds", [False, True], ids=["alone", "beside another gradient"])
def test_the_gradient_of_rms_norm(forms: dict[str, Any], dtype: torch.dtype, width: int, adds: bool) -> None:
    grad, x, weight, beside, dx = drawn(dtype, (5, width), (5, width), (width,), (5, width), (5, width))
    scale = torch.rand(5, device=DEVICE) + 0.5
    assert_same(forms["rms_norm_backward"], norm._backward, grad, x, weight, scale, beside if adds else None, dx)


@each_dtype
@each_width
def test_swiglu_and_its_gradient(forms: dict[str, Any], dtype: torch.dtype, width: int) -> None:
    grad, gate_up, out, d_gate_up = drawn(dtype, (5, width), (5, 2 * width), (5, width), (5, 2 * width))
    assert_same(forms["swiglu"], swiglu._forward, gate_up, out)
    assert_same(forms["swiglu_backward"], swiglu._backward, grad, gate_up, d_gate_up)


@each_dtype
@pytest.mark.parametrize("heads", [1, 6, 8, 20])
@pytest.mark.parametrize(("size", "rotated"), [(8, 8), (96, 96), (96, 72), (128, 32)])
def test_rotation_in_place(forms: dict[str, Any], dtype: torch.dtype, heads: int, size: int, rotated: int) -> None:
    """The values beside the queries and keys stay as they are."""
    qkv, cos, sin = drawn(dtype, (5, (heads + 3) * size), (5, rotated // 2), (5, rotated // 2))
    for sign in (1.0, -1.0):
        found, wanted = qkv.clone(), qkv.clone()
        forms["rotate_"](found.view(5, -1, size)[:, :heads], cos, sin, sign)
        rotary._rotate_.by_torch(wanted.view(5, -1, size)[:, :heads], cos, sin, sign)
        torch.testing.assert_close(found, wanted, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
        assert torch.equal(found[:, heads * size :], qkv[:, heads * size :])


@on_gpu
@pytest.mark.parametrize("window", [None, 1, 45, 1000])
@pytest.mark.parametrize("forest", FORESTS.values(), ids=FORESTS.keys())
@pytest.mark.parametrize("heads", [(4, 2, 96), (3, 3, 64), (9, 3, 128)])
def test_flash_attention_is_no_farther_than_the_products(
    forest: list[tuple[int, int]], heads: tuple[int, int, int], window: int | None
) -> None:
    shape = Heads(*heads, heads[2] ** -0.5, window)
    segments = table(forest)
    rows = torch.tensor(segments)
    qkv, cos, sin, grad = inputs(segments[-1][1], shape, torch.bfloat16)
    leaf = qkv.clone().requires_grad_()
    out = reference(leaf, cos, sin, segments, shape)
    out.backward(grad.double())
    wanted = [out.detach(), leaf.grad]
    errors = []
    for make in (contexts_run, lambda parts, device: grouped_run(parts, shape, device)):
        leaf = qkv.to(DEVICE).requires_grad_()
        run = make(read_segments(rows), DEVICE)
        out = attention(leaf * 1, cos.to(DEVICE), sin.to(DEVICE), [run], shape)
        out.backward(grad.to(DEVICE))
        found = zip((out.detach(), leaf.grad), wanted, strict=True)
        errors.append([float((mine.cpu().double() - exact).norm() / exact.norm()) for mine, exact in found])
    assert all(flash <= 1.2 * products + 1e-3 for flash, products in zip(*errors, strict=True)), errors


@on_gpu
def test_flash_attention_is_what_a_step_takes() -> None:
    rows = torch.tensor([(0, 40, -1), (40, 70, 0), (70, 75, 0)])
    shape, like = Heads(4, 2, 96, 0.1), torch.zeros(1, dtype=torch.bfloat16, device=DEVICE)
    (run,) = planned(rows, read_segments(rows), shape, like)
    assert isinstance(run.groups, Contexts)
