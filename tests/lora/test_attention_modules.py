"""torch's own attention modules read the weights of their layers past `forward`. No adapter is left out by that."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from phinetune import lora

NAMES = ["linear1", "linear2"]


def encoder_layer(targets: list[str] | None = None, **options: Any) -> nn.TransformerEncoderLayer:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    lora.apply(layer, targets or NAMES, r=2, **options)
    for name, parameter in layer.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter)
    return layer


def some_input() -> Tensor:
    torch.manual_seed(1)
    return torch.randn(2, 3, 8)


@pytest.mark.parametrize("targets", [["linear1"], ["linear2"], NAMES], ids=str)
@pytest.mark.parametrize("merge_weights", [True, False])
def test_an_encoder_layer_answers_in_evaluation_as_in_training(merge_weights: bool, targets: list[str]) -> None:
    layer, x = encoder_layer(targets, merge_weights=merge_weights), some_input()
    expected = layer.train()(x)
    with torch.no_grad():
        torch.testing.assert_close(layer.eval()(x), expected)
        for inner in (layer.linear1, layer.linear2):
            if isinstance(inner, lora.LoRALayer):
                inner.unmerge()
        torch.testing.assert_close(layer(x), expected)
        torch.testing.assert_close(layer.train()(x), expected)


def test_without_the_hook_torch_leaves_the_adapter_out() -> None:
    """If this fails, torch has changed, and the hook may go."""
    layer, x = encoder_layer(merge_weights=False).eval(), some_input()
    with torch.no_grad():
        expected = layer(x)
        layer.linear1.remove_guard()  # type: ignore[operator]
        layer.linear2.remove_guard()  # type: ignore[operator]
        assert not torch.allclose(layer(x), expected)


def test_an_encoder_layer_built_by_hand() -> None:
    """loralib's way: the class of the layer is replaced in the code of the model."""
    layer, x = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), some_input()
    layer.linear1 = lora.Linear(8, 16, r=2, merge_weights=False)
    nn.init.normal_(layer.linear1.lora_B)
    expected = layer(x)
    with torch.no_grad():
        torch.testing.assert_close(layer.eval()(x), expected)


def test_a_merged_layer_has_no_hook_and_a_training_one_neither() -> None:
    merged, apart = encoder_layer().eval(), encoder_layer(merge_weights=False).eval()
    count = [len(layer.linear1._forward_pre_hooks) for layer in (merged, apart, copy.deepcopy(apart).train())]
    assert count == [0, 1, 0]
    assert len(apart.eval().linear1._forward_pre_hooks) == 1
    apart.linear1.merge()  # type: ignore[operator]
    assert not apart.linear1._forward_pre_hooks


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("merge_weights", [True, False])
@pytest.mark.parametrize("enable_lora", [None, [True, False]])
def test_a_padded_batch_which_the_encoder_makes_rows_of_different_lengths(
    merge_weights: bool, enable_lora: Any
) -> None:
    layer = encoder_layer(merge_weights=merge_weights, enable_lora=enable_lora)
    encoder, x = nn.TransformerEncoder(layer, 2), some_input()
    padding = torch.tensor([[False, False, True], [False, False, False]])
    expected = encoder(x, src_key_padding_mask=padding)
    with torch.no_grad():
        found = encoder.eval()(x, src_key_padding_mask=padding)
    torch.testing.assert_close(found[~padding], expected[~padding])


@pytest.mark.parametrize("first", ["eval", "unfreeze"])
def test_the_gradient_of_the_weight_itself_is_not_lost_in_the_fast_path(first: str) -> None:
    layer, x = encoder_layer().requires_grad_(False), some_input()
    weight = dict(layer.linear1.named_parameters())["weight"]
    if first == "eval":
        layer.eval()
    weight.requires_grad_()
    layer.eval()(x).square().sum().backward()
    assert layer.linear1.merged
    found, weight.grad = weight.grad, None
    layer.train()(x).square().sum().backward()
    torch.testing.assert_close(found, weight.grad)


@pytest.mark.parametrize("changed", ["linear1.lora_A", "linear2.lora_B", "linear1.weight"])
def test_what_changes_while_merged_is_in_the_next_answer_of_the_fast_path(changed: str) -> None:
    layer, other, x = encoder_layer().eval(), encoder_layer().train(), some_input()
    with torch.no_grad():
        for one in (layer, other):
            dict(one.named_parameters())[changed].mul_(2)
        torch.testing.assert_close(layer(x), other(x))


def by_hand() -> nn.Module:
    attention = nn.MultiheadAttention(8, 2)
    attention.out_proj = lora.Linear(8, 8, r=2)  # type: ignore[assignment]
    return attention


def in_a_layer() -> nn.Module:
    layer = nn.TransformerDecoderLayer(8, 2, 16)
    layer.multihead_attn.out_proj = lora.Linear(8, 8, r=2)  # type: ignore[assignment]
    return layer


@pytest.mark.parametrize(("make", "name"), [(by_hand, "^out_proj"), (in_a_layer, "^multihead_attn.out_proj")])
def test_an_adapter_that_attention_would_never_call_is_refused(make: Any, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}: nn.MultiheadAttention reads .* never calls it"):
        lora.mark_only_lora_as_trainable(make())


def test_attention_without_such_an_adapter_is_marked() -> None:
    layer = encoder_layer()
    layer.self_attn.out_proj = lora.Linear(8, 8)  # type: ignore[assignment]
    lora.mark_only_lora_as_trainable(layer)
    assert {name for name, parameter in layer.named_parameters() if parameter.requires_grad} == {
        f"{name}.{letter}" for name in NAMES for letter in ("lora_A", "lora_B")
    }
