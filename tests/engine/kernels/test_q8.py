"""Weights in q8_0 are llama.cpp's, and their products those of the numbers that they stand for."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

from phinetune.engine.kernels import matmul, q8
from phinetune.engine.kernels.native import operator

SHAPES = [(1, 1), (5, 31), (3, 32), (4, 33), (7, 100), (40, 576), (10, 2080)]


@pytest.fixture(params=["native", "torch"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both forms of the operators, whichever this machine has chosen."""
    forms = {}
    if request.param == "native":
        if not operator.has_library():
            pytest.skip("no native kernels on this machine: the log says why")
        kinds = (torch.float32, torch.bfloat16)
        forms = {(name, kind): operator.native_form(name) for name in ("few_rows_of_q8", "expand_q8") for kind in kinds}
    monkeypatch.setattr(operator, "chosen", lambda: forms)
    return request.param


def drawn(out: int, width: int) -> Tensor:
    """A weight with rows of unlike sizes, one of them nothing but zeros."""
    weight = torch.randn(out, width, generator=torch.Generator().manual_seed(width))
    return weight * torch.logspace(-6, 3, out)[:, None] * (torch.arange(out) != 2)[:, None]


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("out", "width"), [(1, 32), (40, 576), (10, 2080)])
def test_the_numbers_are_those_of_gguf_files(out: int, width: int, kind: torch.dtype) -> None:
    gguf = pytest.importorskip("gguf")
    weight = drawn(out, width).to(kind)
    weight[0, :4] = torch.tensor([1.27, 0.005, -0.015, 0.025])  # halves between two steps
    numbers, scales = q8.quantize(weight)
    blocks = gguf.quantize(weight.float().numpy(), gguf.GGMLQuantizationType.Q8_0).reshape(out, -1, 2 + q8.BLOCK)
    assert (blocks[..., :2].view("<f2")[..., 0] == scales.numpy()).all()
    assert (blocks[..., 2:].view("int8").reshape(out, width) == numbers.numpy()).all()
    theirs = gguf.dequantize(blocks.reshape(out, -1), gguf.GGMLQuantizationType.Q8_0)
    assert (theirs == q8.expanded(numbers, scales).numpy()).all()


@pytest.mark.parametrize(("out", "width"), SHAPES)
def test_a_number_is_off_by_half_a_step_at_most(out: int, width: int) -> None:
    weight = drawn(out, width)
    numbers, scales = q8.quantize(weight)
    assert (numbers.shape, scales.shape) == ((out, width), (out, -(-width // q8.BLOCK)))
    steps = scales.float().repeat_interleave(q8.BLOCK, 1)[:, :width]
    # The scale is rounded, too: to 11 bits, and below 6e-8 to nothing.
    allowed = steps * 0.5 + steps * q8.LARGEST * 2**-11 + 1e-5
    assert ((q8.expanded(numbers, scales) - weight).abs() <= allowed).all()


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 2, 7, 8, 9, 20, 63])
@pytest.mark.parametrize(("out", "width"), SHAPES)
def test_few_rows_have_the_product_of_these_numbers(
    form: str, out: int, width: int, rows: int, kind: torch.dtype
) -> None:
    x = torch.randn(rows, 2 * width)[:, ::2].to(kind)
    held = q8.quantize(drawn(out, width).clamp(-3, 3))
    found, exact = q8.few_rows(x, *held), x.double() @ q8.expanded(*held).double().t()
    assert (found.shape, found.dtype) == ((rows, out), kind)
    near = 2e-5 if kind == torch.float32 else 2**-8
    torch.testing.assert_close(found.double(), exact, rtol=near, atol=near * width**0.5)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("out", "width"), SHAPES)
def test_blocks_are_these_numbers_once_rounded(form: str, out: int, width: int, kind: torch.dtype) -> None:
    held = q8.quantize(drawn(out, width))
    whole = torch.empty(out, width, dtype=kind)
    for rows, block in q8.read_blocks(*held, 3 * width, kind):
        whole[rows] = block
    assert torch.equal(whole, q8.expanded(*held).to(kind))
    x = torch.randn(70, width).to(kind)
    made = matmul.forward_by_blocks(x, functools.partial(q8.read_blocks, *held), out, None)
    assert torch.equal(made, matmul.forward_by_blocks(x, functools.partial(matmul.read_blocks, whole), out, None))


def test_many_rows_and_rows_with_a_graph_are_not_taken(form: str) -> None:
    few = torch.randn(3, 32)
    assert q8.takes_few(few) == (form == "native")
    assert not q8.takes_few(torch.randn(64, 32))
    assert not q8.takes_few(few[:0])
    assert not q8.takes_few(few.requires_grad_())
    with torch.no_grad():
        assert q8.takes_few(few) == (form == "native")


def test_a_native_form_refuses_what_it_would_read_past_its_end() -> None:
    if not operator.has_library():
        pytest.skip("no native kernels on this machine: the log says why")
    numbers, scales = q8.quantize(torch.randn(4, 64))
    x, run = torch.randn(2, 64), operator.native_form("few_rows_of_q8")
    for wrong in (
        (x[:, :32], numbers, scales),
        (x, numbers, scales[:, :1]),
        (x, numbers.float(), scales),
        (x, numbers, scales.float()),
    ):
        with pytest.raises(RuntimeError, match="phinetune: a tensor of another"):
            run(*wrong, torch.empty(2, 4))
