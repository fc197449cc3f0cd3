"""Merging can be undone to the bit, survives moving and loading, and touches no one else's weight."""

from __future__ import annotations

from typing import Any

import loralib
import pytest
import torch
from torch import nn

from lora.lora_helpers import ALL, LINEARS, ONE_OF_EACH, Kind, assert_close, fill
from phinetune import lora

BASES: list[tuple[Any, dict[str, Any]]] = [
    (lambda: nn.Linear(4, 6), {}),
    (lambda: nn.Linear(4, 6, bias=False), {"enable_lora": [True, False, True]}),
    (lambda: nn.Linear(4, 6), {"enable_lora": [True, False, True], "splits": [3, 1, 2]}),
    (lambda: nn.Embedding(7, 4, padding_idx=2), {}),
    (lambda: nn.Conv1d(4, 6, 3, padding="same", padding_mode="reflect"), {}),
    (lambda: nn.Conv2d(4, 6, (3, 2), stride=2, groups=2, bias=False), {}),
    (lambda: nn.Conv3d(4, 6, 2, dilation=2, padding=1), {}),
]
NAMES = ["Linear", "MergedLinear equal", "MergedLinear unequal", "Embedding", "Conv1d", "Conv2d", "Conv3d"]
INPUTS = [(3, 4), (3, 4), (3, 4), (), (2, 4, 5), (2, 4, 5, 5), (2, 4, 4, 4, 4)]
CASES = [pytest.param(*base, shape, id=name) for base, shape, name in zip(BASES, INPUTS, NAMES, strict=True)]


def adapted(base: Any, options: dict[str, Any]) -> Any:
    kind = lora.MergedLinear if "enable_lora" in options else getattr(lora, type(base).__name__)
    return kind.from_base(base, 2, lora_alpha=3, **options)


def fill_adapter(layer: Any) -> Any:
    torch.manual_seed(0)
    nn.init.normal_(layer.lora_A)
    nn.init.normal_(layer.lora_B)
    return layer


def some_input(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, dtype=dtype) if shape else torch.tensor([[0, 2, 6], [2, 1, 1]])


# -- to the bit -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ONE_OF_EACH, ids=str)
def test_a_thousand_merges_in_bf16_leave_the_weight_as_it_was(kind: Kind) -> None:
    ours, theirs = kind.pair(dtype=torch.bfloat16)
    before = ours.weight.detach().clone()
    for _ in range(1000):
        ours.eval()
        assert ours.merged
        ours.train()
    assert torch.equal(ours.weight, before)
    for _ in range(10):
        theirs.eval()
        theirs.train()
    assert not torch.equal(getattr(theirs, "conv", theirs).weight, before)


@pytest.mark.parametrize("kind", ALL, ids=str)
def test_the_merged_weight_is_the_exact_sum_rounded_once(kind: Kind) -> None:
    layer = kind.ours(dtype=torch.bfloat16)
    exact = (layer.weight.double() + layer.delta_weight().double()).detach()
    layer.merge()
    torch.testing.assert_close(layer.weight.double(), exact, rtol=2**-8, atol=1e-30)


def test_a_merge_by_hand() -> None:
    layer = lora.Linear(2, 2, r=1, lora_alpha=2, bias=False)
    layer.load_state_dict(
        {
            "weight": torch.tensor([[1.0, 2.0], [3.0, 4.0]]),
            "lora_A": torch.tensor([[1.0, -1.0]]),
            "lora_B": torch.tensor([[1.0], [0.5]]),
        }
    )
    assert layer.eval().weight.tolist() == [[3.0, 0.0], [4.0, 3.0]]
    assert layer.train().weight.tolist() == [[1.0, 2.0], [3.0, 4.0]]


@pytest.mark.parametrize("kind", ONE_OF_EACH, ids=str)
def test_merging_twice_and_unmerging_twice_change_nothing_more(kind: Kind) -> None:
    layer = kind.ours()
    layer.unmerge()
    before = layer.weight.detach().clone()
    layer.merge()
    once = layer.weight.detach().clone()
    layer.merge()
    assert torch.equal(layer.weight, once)
    assert not torch.equal(once, before)
    layer.unmerge()
    layer.unmerge()
    assert torch.equal(layer.weight, before)


@pytest.mark.parametrize("kind", ONE_OF_EACH, ids=str)
def test_without_merge_weights_eval_leaves_the_weight_alone(kind: Kind) -> None:
    layer = kind.ours(merge_weights=False)
    before = layer.weight.detach().clone()
    layer.eval()
    assert not layer.merged
    assert torch.equal(layer.weight, before)
    layer.merge()
    assert layer.merged
    assert not layer.train().merged
    assert torch.equal(layer.weight, before)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_sum_that_is_not_finite_is_refused_and_nothing_merged(bad: float) -> None:
    layer = fill(lora.Linear(3, 3, r=1))
    before = layer.weight.detach().clone()
    with torch.no_grad():
        layer.lora_B[1] = bad
    with pytest.raises(ValueError, match="not finite"):
        layer.merge()
    assert not layer.merged
    assert torch.equal(layer.weight, before)


# -- from_base --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("make", "options", "shape"), CASES)
def test_from_base_shares_the_bases_storage_and_computes_the_same(make: Any, options: Any, shape: Any) -> None:
    base = make().eval()
    layer = adapted(base, {**options, "merge_weights": False})
    assert layer.weight.data_ptr() == base.weight.data_ptr()
    assert not layer.weight.requires_grad
    assert layer.lora_A.requires_grad
    assert layer.training is False
    if getattr(base, "bias", None) is not None:
        assert layer.bias.data_ptr() == base.bias.data_ptr()
        assert layer.bias.requires_grad
    x = some_input(shape)
    torch.testing.assert_close(layer(x), base(x))
    assert layer.lora_A.device == layer.lora_B.device == base.weight.device


@pytest.mark.parametrize(("make", "options", "shape"), CASES)
def test_merging_leaves_the_base_and_a_tied_twin_alone(make: Any, options: Any, shape: Any) -> None:
    base, twin, x = make(), make(), some_input(shape)
    twin.weight = base.weight
    before, expected = base.weight.detach().clone(), twin(x)
    layer = fill_adapter(adapted(base, options))
    layer.eval()
    assert not torch.equal(layer.weight, before)
    assert torch.equal(base.weight, before)
    assert torch.equal(twin(x), expected)
    layer.train()
    assert layer.weight.data_ptr() == base.weight.data_ptr()


@pytest.mark.parametrize(("make", "options", "shape"), CASES)
def test_from_base_keeps_dtype_settings_and_frozen_bias(make: Any, options: Any, shape: Any) -> None:
    base = make().double().requires_grad_(False)
    layer = adapted(base, options)
    assert {p.dtype for p in layer.parameters()} == {torch.float64}
    assert {n for n, p in layer.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}
    settings = (*getattr(base, "__constants__", ()), "padding_idx", "max_norm", "sparse", "groups")
    found, wanted = ({name: getattr(one, name, None) for name in settings} for one in (layer, base))
    assert found == wanted
    x = some_input(shape, torch.float64)
    assert torch.equal(layer.eval()(x), base.eval()(x))


@pytest.mark.parametrize("train_base", [True, False])
def test_from_base_without_rank_is_the_layer_itself(train_base: bool) -> None:
    base = nn.Linear(3, 2).requires_grad_(train_base)
    layer = lora.Linear.from_base(base, 0)
    assert layer.weight.requires_grad is train_base
    assert layer.weight.data_ptr() == base.weight.data_ptr()


# -- unloaded ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize(("make", "options", "shape"), CASES)
def test_unloaded_is_torchs_own_layer_with_the_same_output(make: Any, options: Any, shape: Any, merged: bool) -> None:
    base, x = make().double(), some_input(shape, torch.float64)
    layer = fill_adapter(adapted(base, options)).train(not merged)
    before = {n: t.clone() for n, t in layer.state_dict().items()}
    expected = layer(x)
    torch_layer = layer.unloaded()
    assert type(torch_layer) is type(base)
    assert torch_layer.state_dict().keys() == base.state_dict().keys()
    torch.testing.assert_close(torch_layer(x), expected, rtol=1e-6, atol=1e-6)
    assert layer.merged is merged
    assert torch_layer.training is not merged
    assert repr(torch_layer) == repr(base)
    assert all(torch.equal(before[n], t) for n, t in layer.state_dict().items())
    nn.init.zeros_(torch_layer.weight)
    assert torch.equal(layer(x), expected)


def test_unloaded_turns_a_weight_that_was_stored_the_other_way() -> None:
    layer = LINEARS[2].ours()
    torch_layer, x = layer.unloaded(), LINEARS[2].input()
    assert torch_layer.weight.shape == (5, 7)
    torch.testing.assert_close(torch_layer(x), layer(x))


# -- moving and loading while merged ----------------------------------------------------------------------------------


@pytest.mark.parametrize("move", ["double", "half", "bfloat16"])
@pytest.mark.parametrize("kind", ONE_OF_EACH, ids=str)
def test_moving_while_merged_moves_the_weight_kept_aside_too(kind: Kind, move: str) -> None:
    layer, straight = kind.ours().eval(), kind.ours()
    getattr(layer, move)()
    getattr(straight, move)()
    assert layer.merged
    assert layer.weight.dtype == straight.weight.dtype
    assert torch.equal(layer.weight, straight.eval().weight)
    assert torch.equal(layer.train().weight, straight.train().weight)
    assert layer.weight.dtype == straight.weight.dtype


@pytest.mark.parametrize("kind", ONE_OF_EACH, ids=str)
def test_loading_while_merged_loads_the_unmerged_weight(kind: Kind) -> None:
    other = fill(kind.ours(), seed=1)
    layer = kind.ours().eval()
    layer.load_state_dict(other.state_dict())
    assert layer.merged
    assert_close(layer(kind.input()), other(kind.input()), 1e-5)
    assert torch.equal(layer.train().weight, other.weight)


def test_loading_adapters_alone_into_a_merged_layer_replaces_the_update() -> None:
    layer, other = LINEARS[0].ours().eval(), fill(LINEARS[0].ours(), seed=1)
    layer.load_state_dict(lora.lora_state_dict(other), strict=False)
    other.load_state_dict({n: t for n, t in LINEARS[0].ours().state_dict().items() if "lora_" not in n}, strict=False)
    assert_close(layer(LINEARS[0].input()), other(LINEARS[0].input()), 1e-5)


@pytest.mark.parametrize("assign", [False, True])
def test_loading_into_the_same_layer_while_merged_is_the_identity(assign: bool) -> None:
    layer = LINEARS[0].ours().eval()
    expected = layer(LINEARS[0].input())
    layer.load_state_dict(layer.state_dict(), assign=assign)
    assert torch.equal(layer(LINEARS[0].input()), expected)


def test_training_after_evaluation_goes_on_as_if_there_had_been_none() -> None:
    straight, interrupted, x = LINEARS[0].ours(), LINEARS[0].ours(), LINEARS[0].input()
    for layer, evaluates in ((straight, False), (interrupted, True)):
        lora.mark_only_lora_as_trainable(layer)
        optimizer = torch.optim.AdamW([p for p in layer.parameters() if p.requires_grad], lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            layer(x).square().sum().backward()
            optimizer.step()
            if evaluates:
                layer.eval()(x)
                layer.train()
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), interrupted.parameters(), strict=True))


def test_repr_says_rank_and_whether_it_is_merged() -> None:
    layer = lora.Linear(3, 2, r=1, lora_alpha=4)
    assert "in_features=3, out_features=2, bias=True, r=1, lora_alpha=4" in repr(layer)
    assert "merged" not in repr(layer)
    assert "merged" in repr(layer.eval())
    assert "r=0" in repr(lora.Linear(3, 2))


def test_loralibs_weight_drifts_in_float32_too() -> None:
    theirs = fill(loralib.Linear(64, 64, r=4))
    before = theirs.weight.detach().clone()
    for _ in range(10):
        theirs.eval()
        theirs.train()
    assert not torch.equal(theirs.weight, before)
