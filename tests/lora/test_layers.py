"""The layers take loralib's arguments, have its attributes and shapes, and refuse what makes no sense."""

from __future__ import annotations

import copy
import inspect
import pickle
from typing import Any

import loralib
import pytest
import torch
from torch import nn

from lora.lora_helpers import ALL, ONE_OF_EACH, Kind
from phinetune import lora


def positional(constructor: Any) -> list[tuple[str, Any]]:
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD,)
    return [(p.name, p.default) for p in inspect.signature(constructor).parameters.values() if p.kind in kinds]


@pytest.mark.parametrize("name", ["Linear", "Embedding", "MergedLinear"])
def test_positional_arguments_and_defaults_are_loralibs(name: str) -> None:
    ours, theirs = positional(getattr(lora, name)), positional(getattr(loralib, name))
    assert [n for n, _ in ours] == [n for n, _ in theirs]
    assert all(a == b or list(a) == b for (_, a), (_, b) in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("name", ["Conv1d", "Conv2d", "Conv3d"])
def test_positional_arguments_and_defaults_of_convolutions_are_loralibs(name: str) -> None:
    assert positional(getattr(lora, name)) == positional(loralib.layers.ConvLoRA)[1:]


@pytest.mark.parametrize("kind", ALL, ids=str)
def test_parameters_have_loralibs_names_shapes_and_freezing(kind: Kind) -> None:
    def seen(layer: nn.Module) -> dict[str, Any]:
        return {n.removeprefix("conv."): (p.shape, p.requires_grad) for n, p in layer.named_parameters()}

    assert seen(kind.ours()) == seen(kind.theirs())


@pytest.mark.parametrize("kind", ALL, ids=str)
def test_every_attribute_of_loralibs_instance_is_there(kind: Kind) -> None:
    ours, theirs = kind.pair()
    names = [name for name in vars(theirs) if not name.startswith("_")]
    mine, others = ({name: getattr(layer, name) for name in names} for layer in (ours, theirs))
    values = {name: value for name, value in others.items() if isinstance(value, (int, float, str, tuple, list))}
    tensors = {name: value for name, value in others.items() if isinstance(value, torch.Tensor)}
    assert {name: mine[name] for name in values} == values
    assert [name for name, tensor in tensors.items() if not torch.equal(mine[name], tensor)] == []


def test_a_convolutions_own_parameters_are_found_under_loralibs_name_too() -> None:
    layer = lora.Conv2d(2, 3, 3, r=2)
    assert layer.conv.weight is layer.weight
    assert layer.conv.bias is layer.bias


@pytest.mark.parametrize("fan_in_fan_out", [False, True])
def test_merge_ab_is_loralibs(fan_in_fan_out: bool) -> None:
    ours, theirs = next(k for k in ALL if k.name == "MergedLinear").pair(fan_in_fan_out=fan_in_fan_out)
    torch.testing.assert_close(ours.merge_AB(), theirs.merge_AB())


@pytest.mark.parametrize("kind", ALL, ids=str)
def test_the_same_seed_makes_the_same_layer_as_in_loralib(kind: Kind) -> None:
    torch.manual_seed(7)
    theirs = getattr(loralib, kind.name)(*kind.args, **kind.options)
    torch.manual_seed(7)
    ours = getattr(lora, kind.name)(*kind.args, **kind.options)
    found, wanted = ours.state_dict(), theirs.state_dict()
    assert [name for name, t in wanted.items() if not torch.equal(found[name.removeprefix("conv.")], t)] == []


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("kind", ONE_OF_EACH, ids=str)
def test_without_rank_it_is_torchs_own_layer(kind: Kind, training: bool) -> None:
    ours = kind.ours(r=0)
    torch_layer = getattr(nn, kind.name.replace("Merged", ""))(*kind.args)
    torch_layer.load_state_dict(ours.state_dict())
    assert all(parameter.requires_grad for parameter in ours.parameters())
    assert torch.equal(ours.train(training)(kind.input()), torch_layer.train(training)(kind.input()))


@pytest.mark.parametrize("kind", ONE_OF_EACH, ids=str)
def test_a_new_layer_computes_what_its_base_does(kind: Kind) -> None:
    layer = getattr(lora, kind.name)(*kind.args, **kind.options)
    torch_layer = getattr(nn, kind.name.replace("Merged", ""))(*kind.args)
    torch_layer.load_state_dict(layer.state_dict(), strict=False)
    torch.testing.assert_close(layer(kind.input()), torch_layer(kind.input()))


@pytest.mark.parametrize("kind", ONE_OF_EACH, ids=str)
def test_dtype_and_device_reach_every_parameter(kind: Kind) -> None:
    layer = getattr(lora, kind.name)(*kind.args, **kind.options, dtype=torch.float64, device="meta")
    assert {p.dtype for p in layer.parameters()} == {torch.float64}
    assert {p.device.type for p in layer.parameters()} == {"meta"}
    assert "lora_A" in dict(layer.named_parameters())


@pytest.mark.parametrize("kind", ONE_OF_EACH, ids=str)
def test_a_layer_on_the_meta_device_changes_mode(kind: Kind) -> None:
    layer = getattr(lora, kind.name)(*kind.args, **kind.options, device="meta").eval()
    filled = layer.to_empty(device="cpu").train()
    filled.load_state_dict(kind.ours().state_dict())
    assert torch.equal(filled(kind.input()), kind.ours()(kind.input()))


@pytest.mark.parametrize("kind", ONE_OF_EACH, ids=str)
def test_layers_are_instances_of_torchs(kind: Kind) -> None:
    assert isinstance(kind.ours(), getattr(nn, kind.name.replace("Merged", "")))
    assert isinstance(kind.ours(), lora.LoRALayer)


@pytest.mark.parametrize("kind", [k for k in ONE_OF_EACH if k.name != "Embedding"], ids=str)
@pytest.mark.parametrize("merged", [False, True], ids=["unmerged", "merged"])
@pytest.mark.parametrize(
    "copied", [lambda layer: pickle.loads(pickle.dumps(layer)), copy.deepcopy], ids=["pickle", "deepcopy"]
)
def test_layers_with_dropout_pickle_and_deepcopy(kind: Kind, merged: bool, copied: Any) -> None:
    layer = kind.ours(lora_dropout=0.5).train(not merged)
    twin = copied(layer)
    assert twin.merged is merged
    torch.manual_seed(1)
    expected = layer(kind.input())
    torch.manual_seed(1)
    assert torch.equal(twin(kind.input()), expected)
    twin.train()
    assert torch.equal(twin.weight, layer.state_dict()["weight"])


def test_loralib_does_not_pickle() -> None:
    with pytest.raises((AttributeError, pickle.PicklingError)):
        pickle.dumps(loralib.Linear(2, 2, r=1))


@pytest.mark.parametrize("kind", ONE_OF_EACH, ids=str)
def test_eval_and_train_chain(kind: Kind) -> None:
    layer = kind.ours()
    assert layer.eval() is layer
    assert layer.train() is layer
    assert kind.theirs().eval() is None  # loralib's cannot be chained


@pytest.mark.parametrize("kind", ONE_OF_EACH, ids=str)
def test_rslora_divides_by_the_root_of_the_rank(kind: Kind) -> None:
    by_rank, by_root = kind.ours(r=4, lora_alpha=8), kind.ours(r=4, lora_alpha=8, use_rslora=True)
    assert (by_rank.scaling, by_root.scaling) == (2, 4)
    x, base = kind.input(), kind.ours(r=4, lora_alpha=0)
    torch.testing.assert_close(by_root(x) - base(x), 2 * (by_rank(x) - base(x)), rtol=1e-4, atol=1e-5)


def test_the_number_of_trainable_parameters_follows_from_the_shapes() -> None:
    layer = lora.MergedLinear(10, [6, 2, 2], r=3, enable_lora=[True, False, True], bias=False)
    assert sum(p.numel() for p in layer.parameters() if p.requires_grad) == 2 * 3 * 10 + (6 + 2) * 3


# -- MergedLinear's splits ------------------------------------------------------------------------------------


def test_unequal_splits_are_linear_layers_side_by_side() -> None:
    """Grouped-query attention: 4 query heads, 1 key and value head, of width 2."""
    layer = lora.MergedLinear(6, [8, 2, 2], r=2, lora_alpha=3, enable_lora=[True, False, True], dtype=torch.float64)
    with torch.no_grad():
        layer.lora_B.normal_()
    q, k, v = lora.Linear(6, 8, r=2, lora_alpha=3), nn.Linear(6, 2), lora.Linear(6, 2, r=2, lora_alpha=3)
    weights = layer.state_dict()
    rows = {0: slice(0, 8), 1: slice(8, 10), 2: slice(10, 12)}
    for i, single in enumerate((q, k, v)):
        single.double().load_state_dict({n: weights[n][rows[i]] for n in ("weight", "bias")}, strict=False)
    q.load_state_dict({"lora_A": weights["lora_A"][:2], "lora_B": weights["lora_B"][:8]}, strict=False)
    v.load_state_dict({"lora_A": weights["lora_A"][2:], "lora_B": weights["lora_B"][8:]}, strict=False)
    x = torch.randn(3, 6, dtype=torch.float64)
    expected = torch.cat([q(x), k(x), v(x)], dim=-1)
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(layer.eval()(x), expected)
    assert layer.lora_ind.tolist() == [True] * 8 + [False] * 2 + [True] * 2


def test_loralib_has_no_unequal_splits() -> None:
    with pytest.raises(AssertionError):
        loralib.MergedLinear(6, 13, r=2, enable_lora=[True, False, True])
    with pytest.raises(TypeError):
        loralib.MergedLinear(6, [8, 2, 2], r=2, enable_lora=[True, False, True])


def test_merged_linear_with_no_split_adapted_is_torchs_own_layer() -> None:
    layer, x = lora.MergedLinear(4, 6, r=2), torch.randn(3, 4)
    assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
    assert torch.equal(layer.eval()(x), layer.train()(x))
    assert layer.weight.requires_grad
    with pytest.raises(AttributeError):
        loralib.MergedLinear(4, 6, r=2)(x)


def test_merged_linear_takes_four_dimensions() -> None:
    """loralib's releases before 0.1.2 fail (#92); 0.1.2 does not, so there is nothing to show of it here."""
    layer, x = lora.MergedLinear(4, 6, r=2, enable_lora=[True, False]), torch.randn(2, 3, 5, 4)
    with torch.no_grad():
        layer.lora_B.normal_()
    torch.testing.assert_close(layer(x), layer(x.view(-1, 4)).view(2, 3, 5, 6))


# -- refusals ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: lora.Linear(2, 2, r=-1), "r must be 0 .* not -1"),
        (lambda: lora.Conv1d(2, 2, 1, r=-3), "r must be 0 .* not -3"),
        (lambda: lora.Embedding(2, 2, r=-2), "r must be 0 .* not -2"),
        (lambda: lora.Linear(2, 2, r=1, lora_dropout=1.0), r"lora_dropout must lie in \[0, 1\), not 1.0"),
        (lambda: lora.Linear(2, 2, r=1, lora_dropout=-0.1), r"lora_dropout must lie in \[0, 1\), not -0.1"),
        (lambda: lora.MergedLinear(2, 7, r=1, enable_lora=[True, False]), "7 can't be divided into 2 equal splits"),
        (lambda: lora.MergedLinear(2, [4, 2], r=1, enable_lora=[True] * 3), "names 2 splits, but enable_lora names 3"),
        (lambda: lora.MergedLinear(2, [4, -2, 3], r=1, enable_lora=[True] * 3), r"\[4, -2, 3\]"),
        (lambda: lora.MergedLinear(2, 4, r=1, enable_lora=[]), "enable_lora is empty"),
        (lambda: lora.MergedLinear.from_base(nn.Linear(2, 6), 1, [True, True], splits=[3, 2]), "don't add up .* 6"),
    ],
    ids=[
        "negative rank",
        "negative rank of a convolution",
        "negative rank of an embedding",
        "dropout of 1",
        "negative dropout",
        "uneven splits",
        "more switches than splits",
        "a split of no rows",
        "no switches",
        "splits of another sum",
    ],
)
def test_nonsense_is_refused_with_a_message(make: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        make()


def test_loralib_takes_a_negative_rank_for_none() -> None:
    assert not hasattr(loralib.Linear(2, 2, r=-1), "lora_A")
