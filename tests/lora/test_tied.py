"""Merging a layer never reaches a layer with the same weight, and is undone to the bit, however the two were tied."""

from __future__ import annotations

import copy
import io
from typing import Any

import loralib
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from lora.lora_helpers import ONE_OF_EACH, Kind, fill
from phinetune import lora

IDS = torch.tensor([[1, 2, 3], [4, 5, 6]])


class Tied(nn.Module):
    """A language model's two ends over one weight. Each may be adapted or not."""

    def __init__(self, embed: Any, head: Any, head_first: bool = False, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        if head_first:
            self.head = head
        self.embed, self.head = embed, head
        self.to(dtype)
        fill(self)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Any:
        return self.head(torch.tanh(self.embed(ids)))


def one_adapted(source: Any = lora, **options: Any) -> Tied:
    return Tied(nn.Embedding(8, 4), source.Linear(4, 8, r=2, bias=False), **options)


def both_adapted(source: Any = lora, **options: Any) -> Tied:
    return Tied(source.Embedding(8, 4, r=2), source.Linear(4, 8, r=2, bias=False), **options)


def embedding_adapted(source: Any = lora, **options: Any) -> Tied:
    return Tied(source.Embedding(8, 4, r=2), nn.Linear(4, 8, bias=False), **options)


def merged_linear(source: Any = lora, **options: Any) -> Tied:
    head = source.MergedLinear(4, 8, r=2, enable_lora=[True, False], bias=False)
    return Tied(nn.Embedding(8, 4), head, **options)


MODELS = [one_adapted, both_adapted, embedding_adapted, merged_linear]


def clones(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    assert [name for name, tensor in wanted.items() if not torch.equal(found[name], tensor)] == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("make", MODELS)
def test_a_hundred_rounds_leave_a_tied_weight_as_it_was(make: Any, dtype: torch.dtype) -> None:
    model = make(dtype=dtype)
    before, parameter = clones(model), model.embed.weight
    for _ in range(100):
        model.eval()
        assert_same(model.state_dict(), before)
        model.train()
    assert_same(model.state_dict(), before)
    assert model.embed.weight is model.head.weight is parameter


def test_loralib_spoils_a_tied_weight_and_saves_the_update_twice() -> None:
    model = both_adapted(loralib)
    before = clones(model)
    model.eval()
    assert not torch.allclose(model.state_dict()["embed.weight"], before["embed.weight"])


@pytest.mark.parametrize("make", MODELS)
def test_a_tied_model_computes_the_same_in_both_modes(make: Any) -> None:
    model = make(dtype=torch.float64)
    expected = model(IDS).detach()
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(IDS), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(model.train()(IDS), expected, rtol=0, atol=0)


def test_the_twin_without_an_adapter_never_sees_the_update() -> None:
    model = one_adapted()
    before = model.embed(IDS).detach()
    model.eval()
    assert torch.equal(model.embed(IDS), before)
    assert model.head.merged
    assert not torch.equal(model.head.weight, model.embed.weight)


@pytest.mark.parametrize("names", ["kernels", "convolution beside torch's own"])
def test_tied_convolutions(names: str) -> None:
    first, second = fill(lora.Conv2d(2, 2, 3, r=1)), fill(lora.Conv2d(2, 2, 3, r=1 if names == "kernels" else 0))
    second.weight = first.weight
    before = first.weight.detach().clone()
    for _ in range(3):
        nn.ModuleList([first, second]).eval()
        assert torch.equal(second.state_dict()["weight"], before)
        nn.ModuleList([first, second]).train()
    assert first.weight is second.weight
    assert torch.equal(first.weight, before)


def test_a_checkpoint_of_a_tied_model_in_evaluation_mode_loads_into_a_training_one() -> None:
    model, other = both_adapted(), fill(both_adapted(), seed=1)
    expected = model(IDS)
    other.load_state_dict(model.eval().state_dict())
    assert torch.equal(other.train()(IDS), expected)


# -- tied, loaded, copied and moved while merged ----------------------------------------------------------------------


@pytest.mark.parametrize("head_first", [False, True])
def test_a_checkpoint_that_names_the_tied_weight_once_reaches_a_merged_head(head_first: bool) -> None:
    """The head may be loaded before the embedding: its sum would then hold the old weight."""
    model, other = one_adapted(head_first=head_first), fill(one_adapted(), seed=1)
    state = {name: tensor for name, tensor in other.state_dict().items() if name != "head.weight"}
    model.eval().load_state_dict(state, strict=False)
    with torch.no_grad():
        torch.testing.assert_close(model(IDS), other(IDS))


@pytest.mark.parametrize("changed", ["embed.weight", "head.lora_A", "head.lora_B"])
def test_what_changes_while_merged_is_in_the_next_answer(changed: str) -> None:
    model = one_adapted().eval()
    with torch.no_grad():
        model.get_parameter(changed).mul_(2)
        again = one_adapted()
        again.get_parameter(changed).mul_(2)
        torch.testing.assert_close(model(IDS), again(IDS))


def test_weights_tied_while_merged_stay_tied() -> None:
    """transformers ties anew when it resizes embeddings, and its models are in evaluation mode by default."""
    model, embed = one_adapted().eval(), fill(nn.Embedding(8, 4), seed=3)
    model.embed = embed
    model.head.weight = embed.weight
    assert model.head.weight is embed.weight
    with torch.no_grad():
        expected = torch.tanh(embed(IDS)) @ (embed.weight + model.head.delta_weight()).t()
        torch.testing.assert_close(model(IDS), expected)
    assert model.train().head.weight is embed.weight


@pytest.mark.parametrize("assign", [False, True])
def test_loading_into_a_merged_tied_model(assign: bool) -> None:
    model, other = both_adapted().eval(), fill(both_adapted(), seed=1)
    model.load_state_dict(other.state_dict(), assign=assign)
    with torch.no_grad():
        torch.testing.assert_close(model(IDS), other(IDS))
    assert_same(model.train().state_dict(), other.state_dict())


def through_a_file(model: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, through_a_file])
def test_a_copy_made_while_merged_is_tied_and_apart_from_the_model(copied: Any) -> None:
    model = both_adapted().eval()
    twin = copied(model)
    with torch.no_grad():
        expected = model(IDS).clone()
        assert torch.equal(twin(IDS), expected)
        dict(twin.embed.named_parameters())["weight"].zero_()
        assert torch.equal(model(IDS), expected)
        assert not torch.equal(twin(IDS), expected)
    assert twin.train().head.weight is twin.embed.weight


def test_moving_while_merged_keeps_what_was_tied() -> None:
    model = both_adapted().eval().double()
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float64}
    assert model.train().head.weight is model.embed.weight


@pytest.mark.parametrize("kind", ONE_OF_EACH, ids=str)
def test_the_parameters_of_a_merged_layer_are_the_unmerged_ones(kind: Kind) -> None:
    """So an optimizer, or a moving average, that was made in evaluation mode holds what trains."""
    layer = kind.ours()
    before = dict(layer.named_parameters())
    merged = dict(layer.eval().named_parameters())
    assert all(merged[name] is parameter for name, parameter in before.items())
    assert layer.weight is not before["weight"]


# -- gradients --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ONE_OF_EACH, ids=str)
def test_a_weight_that_trains_gets_its_gradient_in_evaluation_mode_too(kind: Kind) -> None:
    layer, x = kind.ours(dtype=torch.float64), kind.input()
    x = x.double() if x.is_floating_point() else x
    weight = layer.get_parameter("weight").requires_grad_()
    layer(x).sum().backward()
    expected, weight.grad = weight.grad, None
    layer.eval()(x).sum().backward()
    assert layer.merged
    torch.testing.assert_close(weight.grad, expected)


def test_a_sum_made_in_inference_mode_serves_outside_of_it() -> None:
    layer, x = fill(lora.Linear(3, 2, r=1)), torch.randn(2, 3, requires_grad=True)
    with torch.inference_mode():
        layer.eval()
        made_there = fill(lora.Linear(3, 2, r=1)).eval()
        assert torch.equal(made_there(x), layer(x))
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.weight.sum(0).expand(2, 3))


def test_an_adapter_that_is_given_for_one_call_counts_in_evaluation_mode() -> None:
    layer, other, x = fill(lora.Linear(3, 2, r=1)), fill(lora.Linear(3, 2, r=1), seed=1), torch.randn(2, 3)
    given = {name: other.get_parameter(name).detach() for name in ("weight", "bias", "lora_A", "lora_B")}
    torch.testing.assert_close(torch.func.functional_call(layer.eval(), given, (x,)), other(x))
    torch.testing.assert_close(layer(x), layer.train()(x))


def test_an_adapter_that_is_given_for_one_call_gets_its_gradient_in_evaluation_mode() -> None:
    layer, x = fill(lora.Linear(3, 2, r=1)), torch.randn(2, 3)

    def total(lora_b: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {"lora_B": lora_b}, (x,)).sum()

    given = torch.ones(2, 1, requires_grad=True)
    (expected,) = torch.autograd.grad(total(given), given)
    layer.eval()
    (found,) = torch.autograd.grad(total(given), given)
    torch.testing.assert_close(found, expected)


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ONE_OF_EACH, ids=str)
@pytest.mark.parametrize("then", ["train", "call", "eval"])
def test_writing_into_the_sum_is_refused(kind: Kind, then: str) -> None:
    layer = kind.ours().eval()
    nn.init.zeros_(layer.weight)
    with pytest.raises(ValueError, match=r"was written to.*call train\(\) before"):
        layer(kind.input()) if then == "call" else getattr(layer, then)()
    assert not layer.merged
    torch.testing.assert_close(layer(kind.input()), kind.ours()(kind.input()))


def parametrized(layer: nn.Module) -> None:
    nn.utils.parametrizations.weight_norm(layer)


def pruned(layer: nn.Module) -> None:
    prune.identity(layer, "weight")


def with_old_weight_norm(layer: nn.Module) -> None:
    nn.utils.weight_norm(layer)


OLD = pytest.param(with_old_weight_norm, marks=pytest.mark.filterwarnings("ignore::FutureWarning"))
MANAGERS = [parametrized, pruned, OLD]


@pytest.mark.parametrize("manage", MANAGERS)
def test_a_weight_that_torch_computes_anew_at_each_call_is_not_merged(manage: Any) -> None:
    """A merge would be overwritten at the next call, and the update lost."""
    layer, x = fill(lora.Linear(3, 2, r=1)), torch.randn(2, 3)
    manage(layer)
    expected = layer(x)
    torch.testing.assert_close(layer.eval()(x), expected)
    assert not layer.merged
    with pytest.raises(ValueError, match="parametrization, weight norm or pruning manages the weight"):
        layer.merge()


@pytest.mark.parametrize("then", ["train", "call"])
@pytest.mark.parametrize("manage", MANAGERS)
def test_a_sum_that_was_taken_for_the_weight_is_refused(manage: Any, then: str) -> None:
    layer = fill(lora.Linear(3, 2, r=1)).eval()
    manage(layer)
    with pytest.raises(ValueError, match=r"taken over by a parametrization.*call train\(\) before"):
        layer.train() if then == "train" else layer(torch.randn(2, 3))


def test_a_weight_that_fsdp_has_taken_over_is_used_apart() -> None:
    layer, x = fill(lora.Linear(3, 2, r=1)), torch.randn(2, 3)
    weight = layer.weight
    layer.eval()
    weight._fsdp_flattened = True
    with torch.no_grad():
        weight.mul_(2)
        torch.testing.assert_close(layer(x), nn.functional.linear(x, weight + layer.delta_weight(), layer.bias))
