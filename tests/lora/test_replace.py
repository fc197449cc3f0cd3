"""apply() puts LoRA into a model that is there, unload() takes it out, and neither stops half way."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from phinetune import lora
from phinetune.lora.merged import MergedWeight


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv_proj = nn.Linear(8, 16)
        self.o_proj = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv_proj(x).split([8, 4, 4], dim=-1)
        mixed: Tensor = self.o_proj(q * torch.cat([k, v], dim=-1))
        return x + mixed


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.layers = nn.ModuleList([Layer(), Layer()])
        self.norm = nn.LayerNorm(8)
        self.proj = nn.Linear(8, 4)

    def forward(self, ids: Tensor) -> Any:
        x = self.embed(ids)
        x = x + self.conv(x.transpose(1, 2)).transpose(1, 2)
        for layer in self.layers:
            x = layer(x)
        return self.proj(self.norm(x))


ALL_NAMES = ["embed", "conv", *(f"layers.{i}.{name}" for i in (0, 1) for name in ("qkv_proj", "o_proj")), "proj"]
IDS = torch.tensor([[1, 2, 3], [4, 5, 6]])


def adapted_names(model: nn.Module) -> list[str]:
    return [name for name, layer in model.named_modules() if isinstance(layer, lora.LoRALayer)]


def with_adapters(model: Model) -> Model:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_()
    return model


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (["proj"], ["proj"]),
        (["o_proj"], ["layers.0.o_proj", "layers.1.o_proj"]),
        (["1.o_proj", "embed"], ["embed", "layers.1.o_proj"]),
        (("layers.0.qkv_proj",), ["layers.0.qkv_proj"]),
        (r"layers\.\d+\.(qkv|o)_proj", [n for n in ALL_NAMES if n.startswith("layers")]),
        (r".*proj", [n for n in ALL_NAMES if n.endswith("proj")]),
        ("proj", ["proj"]),
        (r".*", ALL_NAMES),
    ],
    ids=str,
)
def test_names_their_ends_or_a_pattern_choose_the_layers(targets: Any, expected: list[str], capsys: Any) -> None:
    model = Model()
    before, kinds = model(IDS), {n: type(m) for n, m in model.named_modules()}
    assert lora.apply(model, targets, r=2, lora_alpha=3) == expected
    assert adapted_names(model) == expected
    assert torch.allclose(model(IDS), before)
    ours = {"embed": "Embedding", "conv": "Conv1d"}
    printed = [f"{n}: {ours.get(n, 'Linear')} -> lora.{ours.get(n, 'Linear')}, r=2" for n in expected]
    assert capsys.readouterr().out.splitlines() == printed
    layers: dict[str, Any] = {name: model.get_submodule(name) for name in expected}
    assert {name: (layer.r, layer.scaling) for name, layer in layers.items()} == dict.fromkeys(expected, (2, 1.5))
    assert [name for name, layer in layers.items() if not isinstance(layer, kinds[name])] == []


@pytest.mark.parametrize(
    ("targets", "named"),
    [
        pytest.param(["fc1", "proj"], "'fc1'", id="one name of two"),
        pytest.param("pro", "'pro'", id="a pattern for part of a name"),
        pytest.param([], "empty", id="no names"),
        pytest.param("", "''", id="an empty pattern"),
    ],
)
def test_what_matches_nothing_is_refused_with_the_candidates(targets: Any, named: str) -> None:
    model = Model()
    with pytest.raises(ValueError, match=named) as raised:
        lora.apply(model, targets, r=2)
    assert str(raised.value).endswith(": " + ", ".join(ALL_NAMES))
    assert adapted_names(model) == []


@pytest.mark.parametrize(
    "model",
    [pytest.param(nn.LayerNorm(3), id="no linear layer"), pytest.param(nn.Linear(2, 2), id="a layer without a parent")],
)
def test_a_model_with_nothing_to_adapt_says_so(model: nn.Module) -> None:
    with pytest.raises(ValueError, match="layers that can be adapted: none"):
        lora.apply(model, ".*", r=2)


def test_a_string_is_a_pattern_and_no_ending() -> None:
    with pytest.raises(ValueError, match="pattern 'o_proj' matches no layer"):
        lora.apply(Model(), "o_proj", r=2)


def test_the_weights_are_shared_not_copied() -> None:
    model = Model()
    pointers = {name: model.get_submodule(name).weight.data_ptr() for name in ALL_NAMES}
    lora.apply(model, ".*", r=2)
    assert {name: model.get_submodule(name).weight.data_ptr() for name in ALL_NAMES} == pointers


def test_enable_lora_makes_merged_linear_layers() -> None:
    model = Model()
    enable = [True, False, True]
    lora.apply(model, ["qkv_proj"], r=2, enable_lora=enable, splits=[8, 4, 4], lora_dropout=0.1, use_rslora=True)
    layer: Any = model.layers[0].qkv_proj
    assert isinstance(layer, lora.MergedLinear)
    assert layer.splits == [8, 4, 4]
    assert layer.enable_lora == enable
    assert layer.scaling == 1 / 2**0.5
    assert layer.lora_B.shape == (12, 2)
    lora.mark_only_lora_as_trainable(model)
    model(IDS).sum().backward()
    assert layer.lora_B.grad is not None


@pytest.mark.parametrize("options", [{"enable_lora": [True] * 3}, {"lora_dropout": 2.0}, {"unknown": 1}], ids=str)
def test_options_that_do_not_fit_leave_the_model_as_it_was(options: Any) -> None:
    """The second layer's 8 rows can't be divided by three. The first layer's could, and it comes before."""
    model = nn.Sequential(nn.Linear(3, 6), nn.Linear(6, 8))
    with pytest.raises((ValueError, TypeError)):
        lora.apply(model, ".*", r=2, **options)
    assert adapted_names(model) == []


def test_applying_again_adapts_the_rest() -> None:
    model = Model()
    lora.apply(model, ["proj"], r=2)
    assert "proj" not in lora.apply(model, ".*", r=3)
    assert sorted(adapted_names(model)) == sorted(ALL_NAMES)
    assert model.proj.r == 2


def test_a_layer_under_two_names_stays_one_layer() -> None:
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    model["c"] = model["a"]
    assert lora.apply(model, ".*", r=2) == ["a", "b", "c"]
    assert model["a"] is model["c"]
    assert isinstance(model["a"], lora.Linear)
    lora.unload(model)
    assert model["a"] is model["c"]
    assert type(model["a"]) is nn.Linear


def test_attentions_own_projection_is_left_alone() -> None:
    """nn.MultiheadAttention reads its out_proj's weight and never calls it: an adapter there would do nothing."""
    model = nn.TransformerEncoderLayer(8, 2, 16)
    assert lora.apply(model, ".*", r=2) == ["linear1", "linear2"]


def test_in_training_mode_or_not_as_the_model_was() -> None:
    model = Model().eval()
    lora.apply(model, ["proj"], r=2)
    assert not model.proj.training
    assert model.proj.merged
    assert model.proj.weight is not dict(model.proj.named_parameters())["weight"]


@pytest.mark.parametrize("merged", [False, True])
def test_unload_gives_torchs_own_layers_with_the_update_in_them(merged: bool) -> None:
    torch.manual_seed(0)
    model, names = Model(), list(Model().state_dict())
    lora.apply(model, ".*", r=2)
    with_adapters(model).train(not merged)
    expected = model(IDS)
    unloaded = lora.unload(model)
    assert unloaded is model
    assert adapted_names(model) == []
    assert list(model.state_dict()) == names
    torch.testing.assert_close(model(IDS), expected, rtol=1e-4, atol=1e-4)
    fresh = Model()
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(IDS), model(IDS))


def test_unload_of_a_layer_alone() -> None:
    layer = lora.Linear(3, 2, r=1)
    unloaded, x = lora.unload(layer), torch.randn(2, 3)
    assert type(unloaded) is nn.Linear
    torch.testing.assert_close(unloaded(x), layer(x))


def test_in_evaluation_mode_each_layer_is_merged_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    of = MergedWeight.of
    monkeypatch.setattr(MergedWeight, "of", lambda total, parts: made.append(total) or of(total, parts))
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).eval()
    lora.apply(model, ".*", r=2)
    assert len(made) == 2
    assert [layer.training for layer in model] == [False, False]
    assert all(layer.merged for layer in model)
