"""Outputs and gradients are loralib's, and are right where it is not; what a step keeps and makes is small."""

from __future__ import annotations

from typing import Any

import loralib
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lora.lora_helpers import (
    ALL,
    CONVOLUTIONS,
    LINEARS,
    MERGED_LINEARS,
    ONE_OF_EACH,
    QKV,
    Kind,
    assert_all_close,
    assert_close,
    fill,
    gradients,
)
from phinetune import lora
from phinetune.lora.functional import lora_linear

CASES = [pytest.param(kind, shape, id=f"{kind}-{shape}") for kind in ALL for shape in kind.shapes]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("kind", "shape"), CASES)
def test_outputs_and_all_gradients_are_loralibs(kind: Kind, shape: tuple[int, ...], training: bool) -> None:
    ours, theirs = kind.pair(merge_weights=False)
    ours.train(training)
    theirs.train(training)
    x = kind.input(shape)
    found = gradients(ours, x)
    assert {"lora_A", "lora_B"} <= found.keys()
    assert_all_close(found, gradients(theirs, x))


@pytest.mark.parametrize(("kind", "shape"), CASES)
def test_merged_outputs_and_gradients_are_loralibs(kind: Kind, shape: tuple[int, ...]) -> None:
    ours, theirs = kind.pair()
    ours.eval()
    theirs.eval()
    assert ours.merged
    x = kind.input(shape)
    if x.is_floating_point():
        assert_all_close(gradients(ours, x), gradients(theirs, x))
    assert_close(ours(x), theirs(x))
    assert_close(ours(x), ours.train()(x), 1e-5)


@pytest.mark.parametrize("kind", ALL, ids=str)
def test_a_weight_that_trains_gets_loralibs_gradient(kind: Kind) -> None:
    ours, theirs = kind.pair()
    for layer in (ours, theirs):
        layer.requires_grad_()
    found = gradients(ours, kind.input())
    assert "weight" in found
    assert_all_close(found, gradients(theirs, kind.input()))


@pytest.mark.parametrize("frozen", ["lora_A", "lora_B", "bias", "input"])
@pytest.mark.parametrize("kind", [LINEARS[0], MERGED_LINEARS[0]], ids=str)
def test_what_is_frozen_gets_no_gradient_and_changes_no_other(kind: Kind, frozen: str) -> None:
    ours, theirs = kind.pair()
    x = kind.input()
    for layer in (ours, theirs):
        for name, parameter in layer.named_parameters():
            parameter.requires_grad = name not in (frozen, "weight")
        if frozen == "input":
            layer(x).sum().backward()
    if frozen == "input":
        for name in ("lora_A", "lora_B", "bias"):
            assert_close(getattr(ours, name).grad, getattr(theirs, name).grad, what=name)
    else:
        found = gradients(ours, x)
        assert frozen not in found
        assert_all_close(found, gradients(theirs, x))


@pytest.mark.parametrize("kind", [*LINEARS, *MERGED_LINEARS], ids=str)
def test_with_one_seed_dropout_drops_what_loralib_drops(kind: Kind) -> None:
    ours, theirs = kind.pair(lora_dropout=0.4)
    found = []
    for layer in (ours, theirs):
        torch.manual_seed(11)
        found.append(gradients(layer, kind.input()))
    assert_all_close(*found)
    ours.eval()
    theirs.eval()
    assert_close(ours(kind.input()), theirs(kind.input()))


@pytest.mark.parametrize("kind", [LINEARS[0], MERGED_LINEARS[0], CONVOLUTIONS[0]], ids=str)
def test_a_dropout_put_in_later_drops(kind: Kind) -> None:
    layer, x = kind.ours(), kind.input()
    before = layer(x)
    layer.lora_dropout = nn.Dropout(0.9)
    assert not torch.equal(layer(x), before)
    layer.lora_dropout = nn.Identity()
    assert torch.equal(layer(x), before)


@pytest.mark.parametrize("kind", CONVOLUTIONS, ids=str)
def test_dropout_of_a_convolution_falls_on_the_updates_input_alone(kind: Kind) -> None:
    layer = kind.ours(lora_dropout=0.4)
    x = kind.input()
    torch.manual_seed(11)
    out = layer(x)
    torch.manual_seed(11)
    dropped = nn.functional.dropout(x, 0.4)
    delta = layer.delta_weight().to(x.dtype)
    expected = layer._conv_forward(x, layer.weight, layer.bias) + layer._conv_forward(dropped, delta, None)
    assert_close(out, expected)


def test_loralib_forgets_the_dropout_of_a_convolution() -> None:
    ours, theirs = CONVOLUTIONS[0].pair(lora_dropout=0.9)
    x = CONVOLUTIONS[0].input()
    assert torch.equal(theirs(x), theirs(x))
    assert not torch.equal(ours(x), ours(x))


WIDE = [
    Kind("Linear", (64, 96), ((5, 10, 64),), {"r": 8, "lora_alpha": 16}),
    Kind("MergedLinear", (64, 96), ((5, 10, 64),), {"r": 8, "lora_alpha": 16, "enable_lora": QKV}),
    Kind("Embedding", (50, 64), ((5, 10),), {"r": 8, "lora_alpha": 16}),
    Kind("Conv2d", (8, 16, 3), ((4, 8, 9, 9),), {"r": 8, "lora_alpha": 16}),
]


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("kind", WIDE, ids=str)
def test_bf16_is_as_near_the_truth_as_loralib(kind: Kind, merged: bool) -> None:
    ours, theirs = kind.pair(dtype=torch.bfloat16)
    exact = kind.theirs(dtype=torch.float64)
    exact.load_state_dict(theirs.state_dict())
    found = []
    for layer, dtype in ((ours, torch.bfloat16), (theirs, torch.bfloat16), (exact, torch.float64)):
        layer.train(not merged)
        x = kind.input(dtype=torch.bfloat16)
        x = x.to(dtype) if x.is_floating_point() else x
        found.append({"output": layer(x).detach()} if merged else gradients(layer, x))
    mine, other, truth = found
    for name, true in truth.items():
        assert mine[name].dtype == torch.bfloat16
        error, allowed = ((t[name].double() - true).norm().item() for t in (mine, other))
        assert error <= 2 * allowed, f"{name}: {error} against loralib's {allowed}"
        assert error <= 0.01 * true.norm().item(), name


@pytest.mark.parametrize("kind", WIDE, ids=str)
def test_float32_adapters_beside_a_bf16_base(kind: Kind) -> None:
    """loralib adds and multiplies unlike dtypes and fails or returns float32."""
    layer = kind.ours(dtype=torch.bfloat16)
    exact = kind.ours(dtype=torch.float64)
    exact.load_state_dict(layer.state_dict())
    layer.lora_A.data, layer.lora_B.data = layer.lora_A.data.float(), layer.lora_B.data.float()
    x = kind.input(dtype=torch.bfloat16)
    found, truth = gradients(layer, x), gradients(exact, x.double() if x.is_floating_point() else x)
    assert found["output"].dtype == torch.bfloat16
    assert found["lora_A"].dtype == found["lora_B"].dtype == torch.float32
    errors = {name: ((found[name].double() - true).norm() / true.norm()).item() for name, true in truth.items()}
    assert {name: error for name, error in errors.items() if error > 0.01} == {}


@pytest.mark.parametrize("name", ["lora_A", "lora_B"])
@pytest.mark.parametrize("kind", [LINEARS[0], MERGED_LINEARS[0]], ids=str)
def test_adapters_of_unlike_dtypes_are_each_cast(kind: Kind, name: str) -> None:
    layer, exact = kind.ours(), kind.ours()
    getattr(layer, name).data = getattr(layer, name).data.double()
    assert_all_close({n: t.float() for n, t in gradients(layer, kind.input()).items()}, gradients(exact, kind.input()))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("kind", WIDE[:2] + WIDE[3:], ids=str)
def test_autocast_trains_as_loralib_does(kind: Kind, dropout: float) -> None:
    ours, theirs = kind.pair(lora_dropout=0.0 if kind.name.startswith("Conv") else dropout)
    found = []
    for layer in (ours, theirs):
        torch.manual_seed(2)
        found.append(gradients(layer, kind.input(), autocast=True))
    assert found[0]["output"].dtype == torch.bfloat16
    assert_all_close(*found, relative=0.03)


# -- gradients against finite differences -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [kind for kind in ALL if "scale_grad_by_freq" not in kind.options], ids=str)
def test_gradcheck_of_each_layer(kind: Kind) -> None:
    layer = kind.ours(dtype=torch.float64)
    layer.requires_grad_()
    x = kind.input(dtype=torch.float64)
    if x.is_floating_point():
        x.requires_grad_()
    names, values = zip(*layer.named_parameters(), strict=True)

    def run(x: Tensor, *parameters: Tensor) -> Any:
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x,))

    assert torch.autograd.gradcheck(run, (x, *values), fast_mode=kind.name.startswith("Conv"))


SPANS = {"whole": None, "one of three": ((2, 4, 0, 2),), "two of three": ((0, 3, 0, 3), (5, 6, 3, 4))}


@pytest.mark.parametrize("spans", SPANS.values(), ids=SPANS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize(
    "form", ["trained weight", "frozen weight", "transposed weight", "strided x", "one row", "4-D"]
)
def test_gradcheck_of_the_function(spans: Any, bias: bool, apart: bool, form: str) -> None:
    torch.manual_seed(0)

    def leaf(*shape: int, trains: bool = True) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, requires_grad=trains)

    rank, out, inner = 2, 6, 5
    count, rows = (1, out) if spans is None else (len(spans), spans[-1][3])
    shape = {"one row": (inner,), "4-D": (1, 2, 2, inner), "strided x": (inner, 3)}.get(form, (3, inner))
    x = leaf(*shape)
    seen = leaf(*shape) if apart else None
    weight = leaf(inner, out) if form == "transposed weight" else leaf(out, inner, trains=form != "frozen weight")
    b = leaf(out) if bias else None

    def run(x: Tensor, weight: Tensor, b: Tensor | None, lora_A: Tensor, lora_B: Tensor, seen: Tensor | None) -> Tensor:
        if form == "strided x":
            x, seen = x.t(), None if seen is None else seen.t()
        weight = weight.t() if form == "transposed weight" else weight
        return lora_linear(x, weight, b, lora_A, lora_B, 1.5, adapter_input=seen, spans=spans)

    lora_A, lora_B = leaf(count * rank, inner), leaf(rows, rank)
    assert torch.autograd.gradcheck(run, (x, weight, b, lora_A, lora_B, seen))
    full = torch.zeros(out, inner, dtype=torch.float64)
    for i, (start, stop, first, last) in enumerate(spans or ((0, out, 0, out),)):
        full[start:stop] = 1.5 * lora_B[first:last] @ lora_A[i * rank : (i + 1) * rank]
    turned, w = (x.t(), weight) if form == "strided x" else (x, weight.t() if form == "transposed weight" else weight)
    base = turned if seen is None else seen.t() if form == "strided x" else seen
    expected = nn.functional.linear(turned, w, b) + base @ full.t()
    torch.testing.assert_close(run(x, weight, b, lora_A, lora_B, seen), expected)


def test_an_empty_batch_passes() -> None:
    layer = fill(lora.Linear(4, 3, r=2))
    out = layer(torch.zeros(0, 4))
    out.sum().backward()
    assert out.shape == (0, 3)
    assert not layer.lora_A.grad.any()


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(use_reentrant: bool) -> None:
    layer = LINEARS[0].ours(lora_dropout=0.3)

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Any:
            return torch.utils.checkpoint.checkpoint(self.layer, x, use_reentrant=use_reentrant)

    torch.manual_seed(1)
    expected = gradients(layer, LINEARS[0].input())
    torch.manual_seed(1)
    again = gradients(Checkpointed(), LINEARS[0].input())
    assert_all_close({n.removeprefix("layer."): t for n, t in again.items()}, expected, 0)


# -- what a training step keeps and makes -------------------------------------------------------------------------

ROWS, IN, OUT, R = 8, 20, 30, 2


def training_layer(source: Any, name: str, **options: Any) -> Any:
    more = {"enable_lora": QKV} if name == "MergedLinear" else {}
    return fill(getattr(source, name)(IN, OUT, r=R, **more, **options))


@pytest.mark.parametrize("name", ["Linear", "MergedLinear"])
def test_only_the_input_and_the_rank_r_product_are_kept_for_the_backward(name: str) -> None:
    layer = training_layer(lora, name)
    x = torch.randn(ROWS, IN, requires_grad=True)
    own = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x).sum().backward()
    width = R * (2 if name == "MergedLinear" else 1)
    assert sorted(t.shape for t in kept) == [(ROWS, width), (ROWS, IN)]
    assert {t.untyped_storage().data_ptr() for t in kept if t.shape == (ROWS, IN)} == {x.untyped_storage().data_ptr()}


class MadeShapes(TorchDispatchMode):
    """Notes the shape of every tensor made, views of the weight apart."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight, self.shapes = weight.untyped_storage().data_ptr(), set[tuple[int, ...]]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() != self.weight:
                self.shapes.add(tuple(tensor.shape))
        return out


def made(layer: Any) -> set[tuple[int, ...]]:
    x = torch.randn(ROWS, IN, requires_grad=True)
    with MadeShapes(layer.weight) as mode:
        layer(x).sum().backward()
    assert (ROWS, OUT) in mode.shapes
    return mode.shapes


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("fan_in_fan_out", [False, True])
@pytest.mark.parametrize("name", ["Linear", "MergedLinear"])
def test_a_training_step_never_makes_a_tensor_of_the_weights_size(
    name: str, fan_in_fan_out: bool, dropout: float
) -> None:
    shapes = made(training_layer(lora, name, fan_in_fan_out=fan_in_fan_out, lora_dropout=dropout))
    assert not shapes & {(OUT, IN), (IN, OUT)}


def test_loralibs_merged_linear_builds_the_whole_update_at_every_step() -> None:
    assert (OUT, IN) in made(training_layer(loralib, "MergedLinear"))


@pytest.mark.parametrize("kind", ONE_OF_EACH, ids=str)
def test_without_gradients_the_output_is_the_same(kind: Kind) -> None:
    layer = kind.ours()
    with torch.inference_mode():
        quiet = layer(kind.input())
    assert torch.equal(quiet, layer(kind.input()))
