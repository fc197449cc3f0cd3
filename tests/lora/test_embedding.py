"""Embedding: the padding row, max_norm, sparse gradients, pretrained weights."""

from __future__ import annotations

import loralib
import pytest
import torch
from torch import Tensor, nn

from lora.lora_helpers import Kind, assert_all_close, fill, gradients
from phinetune import lora

IDS = torch.tensor([[0, 2, 5], [2, 1, 6]])


def rows_as_they_should_be(layer: lora.Embedding) -> Tensor:
    """Every row of the base, renormalised as torch does, plus the update."""
    base = layer.weight.detach().clone()
    if layer.max_norm is not None:
        base = torch.renorm(base, layer.norm_type, 0, layer.max_norm)
    delta = layer.scaling * (layer.lora_B @ layer.lora_A).t().detach()
    if layer.padding_idx is not None:
        delta[layer.padding_idx] = 0
    return base + delta


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("padding_idx", [2, -5])
def test_the_padding_row_gets_no_update_and_no_gradient(padding_idx: int, merged: bool) -> None:
    layer = fill(lora.Embedding(7, 4, r=2, padding_idx=padding_idx)).train(not merged)
    weight = layer.state_dict()["weight"]
    assert torch.equal(layer(IDS)[0, 1], weight[2])
    assert not torch.equal(layer(IDS)[0, 0], weight[0])
    if not merged:
        layer(IDS).sum().backward()
        assert not layer.lora_A.grad[:, 2].any()
        assert layer.lora_A.grad[:, 5].any()


def test_loralib_updates_the_padding_row() -> None:
    theirs = fill(loralib.Embedding(7, 4, r=2, padding_idx=2))
    assert not torch.equal(theirs(IDS)[0, 1], theirs.weight[2])


def test_padding_gives_loralibs_gradients_where_its_update_of_the_row_is_zero() -> None:
    ours, theirs = Kind("Embedding", (7, 4), (), {"r": 2, "padding_idx": 2}).pair()
    with torch.no_grad():
        ours.lora_A[:, 2] = theirs.lora_A[:, 2] = 0
    found, other = gradients(ours, IDS), gradients(theirs, IDS)
    # loralib gives B a gradient for the padding row's A, which is zero here.
    assert_all_close(found, other)


@pytest.mark.parametrize("norm_type", [1.0, 2.0])
def test_max_norm_renormalises_the_bases_rows_alone(norm_type: float) -> None:
    """loralib cuts the rows of A as well, in place: a forward changes what was learned."""
    options = {"r": 2, "max_norm": 0.5, "norm_type": norm_type}
    ours, theirs = Kind("Embedding", (7, 4), (), options).pair()
    learned, expected = ours.lora_A.detach().clone(), rows_as_they_should_be(ours)
    torch.testing.assert_close(ours(IDS), expected[IDS])
    assert torch.equal(ours.lora_A, learned)
    theirs(IDS)
    assert not torch.equal(theirs.lora_A, learned)


def test_max_norm_gives_the_same_merged_unmerged_and_unloaded() -> None:
    layer = fill(lora.Embedding(7, 4, r=2, max_norm=0.5))
    before, expected = layer.weight.detach().clone(), rows_as_they_should_be(layer)[IDS]
    torch.testing.assert_close(layer.eval()(IDS), expected)
    torch.testing.assert_close(layer.eval()(IDS), expected)
    assert torch.equal(layer.train().weight, before)
    torch.testing.assert_close(layer(IDS), expected)
    torch.testing.assert_close(layer.unloaded()(IDS), expected)


def test_an_embedding_with_sparse_gradients_trains() -> None:
    """loralib fails in the backward."""
    ours, theirs = Kind("Embedding", (7, 4), (), {"r": 2, "sparse": True}).pair()
    dense, _ = Kind("Embedding", (7, 4), (), {"r": 2}).pair()
    assert_all_close(gradients(ours, IDS), gradients(dense, IDS), 0)
    with pytest.raises(RuntimeError, match="sparse"):
        gradients(theirs, IDS)


def test_from_pretrained_keeps_the_weights() -> None:
    """loralib draws them anew."""
    weight = torch.randn(7, 4)
    kept = lora.Embedding.from_pretrained(weight.clone(), padding_idx=2)
    assert torch.equal(kept.weight, weight)
    assert not kept.weight.requires_grad
    assert torch.equal(lora.Embedding(7, 4, r=2, _weight=weight.clone()).weight, weight)
    assert not torch.equal(loralib.Embedding.from_pretrained(weight.clone()).weight, weight)


def test_ids_of_int32_and_no_ids_pass() -> None:
    layer = fill(lora.Embedding(7, 4, r=2, padding_idx=2))
    assert torch.equal(layer(IDS.int()), layer(IDS))
    assert layer(torch.zeros(0, 3, dtype=torch.long)).shape == (0, 3, 4)


def test_an_adapter_over_a_tied_embedding_leaves_the_head_alone() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(7, 4), "head": nn.Linear(4, 7, bias=False)})
    model["head"].weight = model["embed"].weight
    before = model["head"].weight.detach().clone()
    lora.apply(model, ["embed"], r=2)
    nn.init.normal_(model["embed"].lora_A)
    model.eval()
    assert torch.equal(model["head"].weight, before)
    assert not torch.equal(model["embed"].weight, before)
