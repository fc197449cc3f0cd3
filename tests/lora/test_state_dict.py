"""What is marked, saved and loaded: loralib's names, in both directions, and never twice the update."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import loralib
import pytest
import torch
from torch import Tensor, nn

from lora.lora_helpers import ALL, IDS, ONE_OF_EACH, Block, Kind, assert_close, fill
from phinetune import lora

BIASES = ["none", "all", "lora_only"]


def torch_names(names: Any) -> set[str]:
    """loralib's names with a convolution's own parameters named as torch does."""
    return {n.replace("conv.conv.", "conv.") for n in names}


def trainable(model: nn.Module) -> set[str]:
    return torch_names(n for n, p in model.named_parameters() if p.requires_grad)


def through_a_file(state: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    torch.save(state, path)
    return dict(torch.load(path, weights_only=True))


# -- marking ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", BIASES)
def test_what_trains_is_what_trains_in_loralib(bias: str) -> None:
    ours, theirs = Block(lora), Block(loralib)
    lora.mark_only_lora_as_trainable(ours, bias)
    loralib.mark_only_lora_as_trainable(theirs, bias)
    # loralib doesn't see that a convolution has a bias: it lies one module further down.
    forgotten = {"conv.bias"} if bias == "lora_only" else set()
    assert trainable(ours) == trainable(theirs) | forgotten
    assert trainable(ours) - trainable(theirs) == forgotten


@pytest.mark.parametrize("bias", BIASES)
def test_what_is_saved_is_what_loralib_saves(bias: str) -> None:
    ours, theirs = Block(lora), Block(loralib)
    forgotten = {"conv.conv.bias"} if bias == "lora_only" else set()
    assert lora.lora_state_dict(ours, bias).keys() == loralib.lora_state_dict(theirs, bias).keys() | forgotten


def test_lora_only_trains_what_it_saves() -> None:
    """In loralib a layer with r=0 trains its bias, which is then not saved."""
    ours, theirs = lora.Linear(2, 2), loralib.Linear(2, 2)
    lora.mark_only_lora_as_trainable(ours, "lora_only")
    loralib.mark_only_lora_as_trainable(theirs, "lora_only")
    assert trainable(ours) == lora.lora_state_dict(ours, "lora_only").keys() == set()
    assert trainable(theirs) == {"bias"}
    assert loralib.lora_state_dict(theirs, "lora_only").keys() == set()


def test_marking_again_follows_the_new_word() -> None:
    model = Block(lora)
    lora.mark_only_lora_as_trainable(model, "all")
    lora.mark_only_lora_as_trainable(model)
    assert all("lora_" in name for name in trainable(model))
    model.requires_grad_(False)
    lora.mark_only_lora_as_trainable(model)
    assert trainable(model) == {n for n, _ in model.named_parameters() if "lora_" in n}


def test_a_layer_alone_is_a_model_too() -> None:
    layer = lora.Conv2d(1, 1, 3, r=1)
    lora.mark_only_lora_as_trainable(layer, "lora_only")
    assert trainable(layer) == {"lora_A", "lora_B", "bias"}
    assert lora.lora_state_dict(layer, "lora_only").keys() == {"lora_A", "lora_B", "conv.bias"}


class Shared(nn.Module):
    """A layer under two names, and a layer of torch's own class that shares its bias."""

    def __init__(self, source: Any) -> None:
        super().__init__()
        self.torch_layer = nn.Linear(3, 3)
        self.first = source.Linear(3, 3, r=2)
        self.second = self.first
        self.first.bias = self.torch_layer.bias


@pytest.mark.parametrize("bias", BIASES)
def test_a_layer_under_two_names_is_saved_and_trained_as_in_loralib(bias: str) -> None:
    ours, theirs = Shared(lora), Shared(loralib)
    lora.mark_only_lora_as_trainable(ours, bias)
    loralib.mark_only_lora_as_trainable(theirs, bias)
    assert trainable(ours) == trainable(theirs)
    assert lora.lora_state_dict(ours, bias).keys() == loralib.lora_state_dict(theirs, bias).keys()


@pytest.mark.parametrize("function", [lora.mark_only_lora_as_trainable, lora.lora_state_dict])
def test_a_wrong_bias_is_refused_with_the_choices(function: Any) -> None:
    model = nn.Linear(1, 1)
    with pytest.raises(ValueError, match="none, all, lora_only, not 'some'"):
        function(model, bias="some")
    assert model.weight.requires_grad
    with pytest.raises(NotImplementedError, match=r"^$"):  # loralib's has no message
        loralib.lora_state_dict(model, bias="some")


# -- loralib's checkpoints and ours ---------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("loader", ["load_lora_state_dict", "load_state_dict"])
@pytest.mark.parametrize("kind", ALL, ids=str)
def test_loralibs_checkpoint_loads_here(kind: Kind, loader: str, bias: str, tmp_path: Path) -> None:
    ours, theirs = kind.pair()
    trained = fill(kind.theirs(), seed=1)
    state = through_a_file(loralib.lora_state_dict(trained, bias), tmp_path / "lora.pt")
    theirs.load_state_dict(state, strict=False)
    if loader == "load_lora_state_dict":
        lora.load_lora_state_dict(ours, state)
    else:
        assert not ours.load_state_dict(state, strict=False).unexpected_keys
    assert_close(ours(kind.input()), theirs(kind.input()))
    assert not torch.equal(ours(kind.input()), kind.ours()(kind.input()))


@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("kind", ALL, ids=str)
def test_our_checkpoint_loads_in_loralib(kind: Kind, bias: str, tmp_path: Path) -> None:
    ours, theirs = kind.pair()
    trained = fill(kind.ours(), seed=1)
    state = through_a_file(lora.lora_state_dict(trained, bias), tmp_path / "lora.pt")
    assert not theirs.load_state_dict(state, strict=False).unexpected_keys
    lora.load_lora_state_dict(ours, state)
    assert_close(ours(kind.input()), theirs(kind.input()))
    assert not torch.equal(theirs(kind.input()), kind.theirs()(kind.input()))


@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("source", [loralib, lora], ids=["saved by loralib", "saved here"])
def test_whole_models_exchange_checkpoints(source: Any, bias: str, tmp_path: Path) -> None:
    pretrained = through_a_file(Block(loralib).state_dict(), tmp_path / "pretrained.pt")
    state = through_a_file(source.lora_state_dict(fill(Block(source), seed=1), bias), tmp_path / "lora.pt")
    ours, theirs = fill(Block(lora), seed=2), fill(Block(loralib), seed=2)
    unexpected = []
    for model in (ours, theirs):
        model.load_state_dict(pretrained)
        unexpected.append(model.load_state_dict(state, strict=False).unexpected_keys)
    assert unexpected == [[], []]
    assert_close(ours(IDS), theirs(IDS), 1e-5)
    assert_close(ours.eval()(IDS), theirs(IDS), 1e-5)


def test_pretrained_weights_of_torchs_own_layers_load() -> None:
    """loralib's convolutions have other names (#108): strict loading fails, and the lax one loads nothing."""
    pretrained = nn.Sequential(nn.Conv1d(2, 3, 3), nn.Conv1d(3, 2, 1))
    ours = nn.Sequential(lora.Conv1d(2, 3, 3, r=2), lora.Conv1d(3, 2, 1, r=2))
    missed = ours.load_state_dict(pretrained.state_dict(), strict=False)
    assert not missed.unexpected_keys
    assert all("lora_" in key for key in missed.missing_keys)
    x = torch.randn(1, 2, 6)
    torch.testing.assert_close(ours(x), pretrained(x))
    theirs = nn.Sequential(loralib.Conv1d(2, 3, 1, r=2))
    assert theirs.load_state_dict(nn.Sequential(nn.Conv1d(2, 3, 1)).state_dict(), strict=False).unexpected_keys


def test_strict_loading_of_an_own_whole_checkpoint() -> None:
    ours, twin = fill(Block(lora), seed=4), Block(lora)
    twin.load_state_dict(ours.state_dict())
    assert torch.equal(twin(IDS), ours(IDS))


# -- loading everything or nothing ------------------------------------------------------------------------------------


def test_the_loader_names_everything_that_is_wrong_and_loads_nothing() -> None:
    model = Block(lora)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    state = lora.lora_state_dict(fill(Block(lora), seed=1))
    del state["embed.lora_A"], state["qkv.lora_B"]
    state["out.lora_A"] = torch.zeros(3, 8)
    state |= {"gone.lora_A": torch.zeros(1), "conv.lora_C": torch.zeros(1)}
    with pytest.raises(ValueError, match="don't fit") as raised:
        lora.load_lora_state_dict(model, state)
    assert str(raised.value).splitlines()[1:] == [
        "missing: embed.lora_A",
        "missing: qkv.lora_B",
        "unexpected: conv.lora_C",
        "unexpected: gone.lora_A",
        "out.lora_A: shape (3, 8) does not match the model's (2, 8)",
    ]
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())


def test_the_loader_loads_into_a_merged_model() -> None:
    model, other = Block(lora), fill(Block(lora), seed=1)
    model.eval()
    lora.load_lora_state_dict(model, lora.lora_state_dict(other, "all"))
    base = {n: t for n, t in Block(lora).state_dict().items() if "lora_" not in n and "bias" not in n}
    other.load_state_dict(base, strict=False)
    assert_close(model(IDS), other(IDS), 1e-5)


def test_the_loader_leaves_the_given_tensors_alone() -> None:
    model, state = Block(lora), lora.lora_state_dict(fill(Block(lora), seed=1), "all")
    names, before = list(state), {n: t.clone() for n, t in state.items()}
    lora.load_lora_state_dict(model, state)
    assert list(state) == names
    fill(model, seed=2)
    assert all(torch.equal(before[n], t) for n, t in state.items())


@pytest.mark.parametrize("state", [{}, {"weight": torch.zeros(2, 2)}], ids=["nothing", "no adapter"])
def test_the_loader_refuses_where_there_are_no_adapters(state: dict[str, Tensor]) -> None:
    with pytest.raises(ValueError, match="neither the model nor what is to be loaded has adapters"):
        lora.load_lora_state_dict(nn.Linear(2, 2), state)


@pytest.mark.parametrize("prefix", ["module.", "base_model.model.", "_orig_mod."])
def test_the_loader_refuses_names_that_the_lax_one_leaves_out(prefix: str) -> None:
    model = Block(lora)
    state = {prefix + name: tensor for name, tensor in lora.lora_state_dict(model).items()}
    assert model.load_state_dict(state, strict=False).unexpected_keys == list(state)
    with pytest.raises(ValueError, match=f"missing: conv.lora_A(.|\n)*unexpected: {prefix}conv.lora_A"):
        lora.load_lora_state_dict(model, state)


# -- after eval() -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ONE_OF_EACH, ids=str)
def test_a_checkpoint_saved_after_eval_does_not_merge_twice(kind: Kind) -> None:
    """loralib's does (#190): it saves merged weights, and the next eval() adds the update to them again."""
    ours, theirs = kind.pair()
    x = kind.input()
    expected = ours(x).detach()
    unmerged = {n: t.clone() for n, t in ours.state_dict().items()}
    found = []
    for layer, again in ((ours, kind.ours()), (theirs, kind.theirs())):
        layer.eval()
        again.load_state_dict(layer.state_dict())
        again.eval()
        found.append(again(x))
    assert all(torch.equal(unmerged[n], t) for n, t in ours.state_dict().items())
    assert_close(found[0], expected, 1e-5)
    with pytest.raises(AssertionError):
        assert_close(found[1], expected, 1e-2)


def test_a_kept_reference_in_the_state_dict_while_merged_is_the_unmerged_weight() -> None:
    layer = fill(lora.Linear(3, 3, r=1))
    weight = layer.weight.detach().clone()
    assert torch.equal(layer.eval().state_dict(keep_vars=True)["weight"], weight)
    assert list(layer.state_dict()) == list(layer.train().state_dict())
