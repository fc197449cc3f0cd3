"""Half-precision matmul that go through float32: the exact product, rounded once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from phinetune.checkpoints.device import has_native_bf16
from phinetune.engine.attention_plan import Heads, plan
from phinetune.engine.kernels import matmul
from phinetune.engine.kernels.attention import attention
from phinetune.engine.kernels.cross_entropy import linear_cross_entropy
from phinetune.engine.segments import Segment
from phinetune.lora.functional import _LoraLinear, lora_linear

BF16 = torch.bfloat16
ULP = 2.0**-8  # bfloat16's rounding, relative


@pytest.fixture(params=[True, False], ids=["slow", "fast"])
def slow(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """A processor whose half-precision matmul are slow, and one where they are fast; whatever this one is."""
    monkeypatch.setattr(matmul, "is_slower_than_float32", lambda dtype: request.param)
    return bool(request.param)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks so small that every product has many, the last ones ragged."""
    monkeypatch.setattr(matmul, "is_slower_than_float32", lambda dtype: True)
    monkeypatch.setattr(matmul, "BLOCK_ELEMENTS", 100)
    monkeypatch.setattr(matmul, "MAX_ROWS", 13)


def layer(rows: int, inner: int, out: int, rank: int, bias: bool, apart: bool) -> dict[str, Any]:
    torch.manual_seed(0)
    return {
        "x": torch.randn(rows, inner).to(BF16),
        "weight": (torch.randn(out, inner) / inner**0.5).to(BF16),
        "bias": torch.randn(out).to(BF16) if bias else None,
        "lora_A": torch.randn(rank, inner) / inner**0.5,
        "lora_B": torch.randn(out, rank),
        "adapter_input": torch.randn(rows, inner).to(BF16) if apart else None,
    }


def results(run: Callable[..., Tensor], given: dict[str, Any], dtype: torch.dtype) -> dict[str, Tensor]:
    """The output and the gradients of x, the adapters and what they see."""
    leaves = {key: value.clone() for key, value in given.items() if value is not None}
    for key in leaves:
        if dtype == torch.float64 or not key.startswith("lora"):  # adapters are float32 over any other base
            leaves[key] = leaves[key].to(dtype)
    trained = [key for key in ("x", "lora_A", "lora_B", "bias", "adapter_input") if key in leaves]
    for key in trained:
        leaves[key].requires_grad_()
    out = run(**{**dict.fromkeys(given), **leaves})
    torch.manual_seed(1)
    out.backward(torch.randn(out.shape).to(BF16).to(dtype))
    return {"output": out.detach(), **{key: leaves[key].grad for key in trained}}


def lora(x: Tensor, weight: Tensor, bias: Any, lora_A: Tensor, lora_B: Tensor, adapter_input: Any) -> Tensor:
    return lora_linear(x, weight, bias, lora_A, lora_B, 0.75, adapter_input)


def reference(x: Tensor, weight: Tensor, bias: Any, lora_A: Tensor, lora_B: Tensor, adapter_input: Any) -> Tensor:
    seen = x if adapter_input is None else adapter_input
    return F.linear(x, weight, bias) + 0.75 * F.linear(F.linear(seen, lora_A), lora_B)


def far(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


@pytest.mark.parametrize("apart", [False, True], ids=["", "dropout"])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize(("rows", "inner", "out", "rank"), [(64, 33, 70, 1), (97, 48, 31, 64), (130, 7, 5, 4)])
def test_an_adapted_product_is_float32s_rounded_once(
    small: None, rows: int, inner: int, out: int, rank: int, bias: bool, apart: bool
) -> None:
    given = layer(rows, inner, out, rank, bias, apart)
    found, wanted = results(lora, given, BF16), results(reference, given, torch.float64)
    for name, value in found.items():
        exact = name in ("lora_A", "lora_B")
        assert value.dtype == (torch.float32 if exact else BF16), name
        assert far(value, wanted[name]) < (1e-6 if exact else ULP / 2), name


def test_it_is_nearer_the_truth_than_the_native_product(monkeypatch: pytest.MonkeyPatch) -> None:
    given = layer(80, 64, 48, 8, bias=False, apart=False)
    wanted = results(reference, given, torch.float64)
    distance = []
    for slow in (True, False):
        monkeypatch.setattr(matmul, "is_slower_than_float32", lambda dtype, slow=slow: slow)
        found = results(lora, given, BF16)
        distance.append([far(found[name], wanted[name]) for name in ("output", "x", "lora_A", "lora_B")])
    assert all(ours < native for ours, native in zip(*distance, strict=True))


def test_few_rows_are_multiplied_as_they_are(slow: bool) -> None:
    """Where converting the weight would take longer than the product: a step of generation, say."""
    x, weight = torch.randn(matmul.MIN_ROWS - 1, 24).to(BF16), torch.randn(40, 24).to(BF16)
    assert torch.equal(matmul.linear(x, weight), F.linear(x, weight))
    assert matmul.goes_through_float32(torch.cat([x, x])) is slow


def test_a_fast_processor_and_float32_take_torchs_own_product(slow: bool) -> None:
    x, weight = torch.randn(100, 24), torch.randn(40, 24)
    assert torch.equal(matmul.linear(x, weight), F.linear(x, weight))
    half = x.to(BF16), weight.to(BF16)
    assert torch.equal(matmul.linear(*half), F.linear(*half)) or slow


@pytest.mark.parametrize("shape", [(90, 24), (3, 30, 24)])
def test_the_base_alone(small: None, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(shape).to(BF16).requires_grad_(), torch.randn(40, 24).to(BF16), torch.randn(40)
    twin = x.detach().double().requires_grad_()
    found, wanted = matmul.linear(x, weight, bias.to(BF16)), F.linear(twin, weight.double(), bias.to(BF16).double())
    grad = torch.randn(wanted.shape).to(BF16)
    found.backward(grad)
    wanted.backward(grad.double())
    assert far(found.detach(), wanted.detach()) < 1.5 * ULP  # the bias is added to what was rounded
    assert x.grad is not None
    assert twin.grad is not None
    assert far(x.grad, twin.grad) < ULP / 2


def test_autocast_casts_the_base_alone_as_it_does_any_product(slow: bool) -> None:
    x, weight, bias = torch.randn(70, 24), torch.randn(40, 24), torch.randn(40)
    with torch.autocast("cpu", BF16):
        found, wanted = matmul.linear(x, weight, bias), F.linear(x, weight, bias)
    assert found.dtype == wanted.dtype == BF16
    assert far(found, wanted) < 2 * ULP


def test_autocast_casts_a_layer_with_an_adapter_in_both_directions(small: None) -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(shape).to(BF16).float() for shape in ((70, 24), (40, 24), (4, 24), (40, 4))]
    found = [tensor.clone().requires_grad_(i != 1) for i, tensor in enumerate(inputs)]
    truth = [tensor.double().requires_grad_(i != 1) for i, tensor in enumerate(inputs)]
    x, weight, a, b = truth
    wanted = x @ weight.t() + 0.5 * (x @ a.t() @ b.t())
    with torch.autocast("cpu", BF16):
        out = lora_linear(found[0], found[1], None, found[2], found[3], 0.5)
        out.sum().backward()
    wanted.sum().backward()
    assert out.dtype == BF16
    assert far(out.detach(), wanted.detach()) < 3 * ULP
    for i in (0, 2, 3):
        gradient, true = found[i].grad, truth[i].grad
        assert gradient is not None
        assert true is not None
        assert far(gradient, true) < 3 * ULP


def test_a_weight_that_trains_gets_its_gradient(small: None) -> None:
    x, weight = torch.randn(70, 12).to(BF16), torch.randn(9, 12).to(BF16).requires_grad_()
    matmul.linear(x, weight).sum().backward()
    assert weight.grad is not None
    a, b = torch.randn(2, 12), torch.randn(9, 2)
    before = weight.grad.clone()
    lora_linear(x, weight, None, a, b, 0.0).sum().backward()
    assert torch.equal(weight.grad, 2 * before)


def test_results_are_no_scratch_memory(small: None) -> None:
    """A later product of the same shape must not change an earlier one's output or gradient."""
    given = layer(70, 24, 40, 2, bias=False, apart=False)
    first = results(lora, given, BF16)
    kept = {name: value.clone() for name, value in first.items()}
    results(lora, {**given, "x": -given["x"]}, BF16)
    assert all(torch.equal(first[name], kept[name]) for name in kept)


def test_rows_do_not_see_each_other(small: None) -> None:
    given = layer(70, 24, 40, 2, bias=False, apart=False)
    found = lora(**given)
    changed = given["x"].clone()
    changed[:20] = 7
    assert torch.equal(lora(**{**given, "x": changed})[20:], found[20:])


@pytest.mark.parametrize(("dtype", "tolerance"), [(BF16, ULP), (torch.float32, 1e-5)], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("rows", [3, 100])
def test_a_weight_given_by_its_blocks(small: None, rows: int, dtype: torch.dtype, tolerance: float) -> None:
    """As a quantised one is. It is read again for the backward, in float32 or in x's dtype, for many rows or few."""
    given = layer(rows, 24, 40, 2, bias=True, apart=False)
    weight, asked = given["weight"].to(dtype), set()

    def read(most: int | None, kind: torch.dtype) -> Any:
        asked.add(most)
        return matmul.read_blocks(weight, most, kind)

    def by_blocks(weight: Tensor, **given: Any) -> Tensor:
        return lora(weight=read, **given)

    found, wanted = results(by_blocks, given, dtype), results(reference, given, torch.float64)
    errors = {name: far(value, wanted[name]) for name, value in found.items()}
    assert {name: error for name, error in errors.items() if error >= tolerance} == {}
    assert asked == {matmul.BLOCK_ELEMENTS}


@pytest.mark.parametrize("apart", [False, True], ids=["the same input", "an adapter's own input"])
def test_many_rows_are_multiplied_in_turns(monkeypatch: pytest.MonkeyPatch, apart: bool) -> None:
    """In float32, with the last turn shorter than the others."""
    monkeypatch.setattr(matmul, "MAX_ROWS", 13)
    given = layer(70, 24, 40, 2, bias=False, apart=apart)
    found, wanted = results(lora, given, torch.float32), results(reference, given, torch.float64)
    assert {name: error for name, value in found.items() if (error := far(value, wanted[name])) >= 1e-5} == {}


@pytest.mark.parametrize("apart", [False, True], ids=["the same input", "an adapter's own input"])
def test_a_weight_expanded_whole_in_each_direction(apart: bool) -> None:
    """As a GPU has it. The numbers are those of the weight itself, to the bit."""
    given = layer(70, 24, 40, 2, bias=True, apart=apart)
    weight, reads = given["weight"], list[int | None]()

    def read(most: int | None, kind: torch.dtype) -> Any:
        reads.append(most)
        return matmul.read_blocks(weight, most, kind)

    found = []
    for one in (read, weight):
        leaves = [given[key].to(BF16, copy=True).requires_grad_() for key in ("x", "lora_A", "lora_B")]
        seen = given["adapter_input"]
        out = _LoraLinear.apply(leaves[0], one, given["bias"], *leaves[1:], 0.5, seen, None)  # type: ignore[no-untyped-call]
        out.square().sum().backward()
        found.append([out, *(leaf.grad for leaf in leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert reads == [None, None]


def test_computing_again_leaves_the_last_product_out(small: None) -> None:
    """Nothing in the layer's own backward needs it; the gradients are the same to the bit."""
    given = layer(70, 24, 24, 2, bias=True, apart=False)
    passes: dict[str, int] = {}

    def read(name: str) -> matmul.BlockReader:
        def blocks(most: int | None, kind: torch.dtype) -> Any:
            passes[name] = passes.get(name, 0) + 1
            return matmul.read_blocks(given["weight"], most, kind)

        return blocks

    def two(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        first = lora_linear(x, read("first"), given["bias"], a, b, 0.5)
        return lora_linear(first, read("last"), None, a, b, 0.5)

    found = []
    for again in (False, True):
        leaves = [given[key].clone().requires_grad_() for key in ("x", "lora_A", "lora_B")]
        out = checkpoint(two, *leaves, use_reentrant=False) if again else two(*leaves)
        out.sum().backward()
        found.append([leaf.grad for leaf in leaves])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    rounds = len(list(matmul.rows_at_once(given["x"])))
    # Forward and backward without, then forward, backward and what is computed again.
    assert passes == {"first": (2 + 3) * rounds, "last": (2 + 2) * rounds}


def test_an_input_without_gradient_keeps_what_the_adapters_need(small: None) -> None:
    given = layer(70, 24, 40, 2, bias=False, apart=False)
    a, b = given["lora_A"].requires_grad_(), given["lora_B"].requires_grad_()
    lora_linear(given["x"], given["weight"], None, a, b, 1.0).sum().backward()
    assert a.grad is not None
    wanted = (torch.ones(40, 70) @ (given["x"].float() @ a.detach().T)).to(torch.float32)
    torch.testing.assert_close(b.grad, wanted)


FOREST = [Segment(0, 70), Segment(70, 90), Segment(90, 101, ((70, 90),)), Segment(101, 140, ((70, 90),))]


def test_attention_is_float32s_rounded_once(slow: bool) -> None:
    heads = Heads(4, 2, 8, 8**-0.5)
    torch.manual_seed(0)
    qkv, grad = torch.randn(140, heads.total * heads.size).to(BF16), torch.randn(140, 32).to(BF16)
    angles = torch.rand(140, 4)
    cos, sin = torch.ones_like(angles), torch.zeros_like(angles)  # rotation rounds by itself
    found = []
    for dtype in (BF16, torch.float64):
        leaf = qkv.clone().to(dtype).requires_grad_()
        runs = plan(FOREST, heads, leaf.device)
        out = attention(leaf * 1, cos.to(dtype), sin.to(dtype), runs, heads)
        out.backward(grad.to(dtype))
        assert leaf.grad is not None
        found.append((out.detach(), leaf.grad))
    for ours, wanted in zip(*found, strict=True):
        assert ours.dtype == BF16
        assert far(ours, wanted) < (ULP if slow else 4 * ULP)


def test_the_heads_loss_is_float32s(small: None) -> None:
    torch.manual_seed(0)
    hidden, head = torch.randn(70, 24).to(BF16), torch.randn(130, 24).to(BF16)
    labels, weights = torch.randint(130, (70,)), torch.rand(70)
    found = []
    for dtype in (BF16, torch.float32):
        leaf = hidden.clone().to(dtype).requires_grad_()
        nll, correct = linear_cross_entropy(leaf, head.to(dtype), labels, weights)
        nll.backward()
        assert leaf.grad is not None
        found.append((nll.detach(), correct, leaf.grad))
    (nll, correct, grad), (wanted, right, exact) = found
    torch.testing.assert_close(nll, wanted, rtol=1e-6, atol=0)
    assert correct == right
    assert far(grad, exact) < ULP / 2


def test_auto_is_bfloat16_only_where_it_is_no_slower(slow: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from phinetune.checkpoints import device

    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    monkeypatch.setattr(device, "has_native_bf16", has_native_bf16)
    assert device.pick_dtype("auto", torch.device("cpu")) == (torch.float32 if slow else BF16)
