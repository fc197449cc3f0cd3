"""The fused layer is PEFT's `Linear`: outputs, gradients, what is saved and what is merged."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import Linear
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn

from engine.engine_helpers import distance
from phinetune.engine.lora_layers import FusedLinear, use_fused_layers

WIDE, NARROW = 20, 12
SHAPES = {"2-D": (7, NARROW), "3-D": (2, 5, NARROW), "4-D": (2, 1, 3, NARROW), "1-D": (NARROW,), "none": (0, NARROW)}


class Net(nn.Module):
    """One layer that gets an adapter, one that doesn't."""

    def __init__(self, bias: bool = False, kind: type[nn.Linear] = nn.Linear) -> None:
        super().__init__()
        self.proj = kind(NARROW, WIDE, bias=bias)
        self.out = nn.Linear(WIDE, 3, bias=False)

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        return self.out(self.proj(x, **kwargs))  # type: ignore[no-any-return]


class Doubling(nn.Linear):
    """A linear layer with a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def make(net: Callable[[], Net], fused: bool, dtype: torch.dtype, **lora: Any) -> PeftModel:
    config = LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": ["proj"], "init_lora_weights": False, **lora})
    base = net().to(dtype)
    return get_peft_model(base, use_fused_layers(config, base) if fused else config)


def pair(
    bias: bool = False, dtype: torch.dtype = torch.float32, kind: type[nn.Linear] = nn.Linear, **lora: Any
) -> tuple[PeftModel, PeftModel]:
    """PEFT's and ours with the same weights."""
    torch.manual_seed(0)
    theirs, ours = (make(lambda: Net(bias, kind), fused, dtype, **lora) for fused in (False, True))
    ours.load_state_dict(theirs.state_dict())
    assert type(layer(theirs)) is Linear
    assert type(layer(ours)) is FusedLinear
    return theirs, ours


def layer(model: PeftModel) -> Any:
    return model.get_base_model().proj


def step(
    model: PeftModel, shape: tuple[int, ...] = (7, NARROW), dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Output, and the gradients of the input and of all that trains, for a random cotangent."""
    model.zero_grad()
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(shape, generator=generator).to(dtype).requires_grad_()
    torch.manual_seed(2)  # dropout
    out = model(x)
    out.backward(torch.randn(out.shape, generator=generator).to(out.dtype))
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert x.grad is not None
    return {**found, "input": x.grad, "output": out.detach()}


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor], within: float = 1e-6) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert (found[name].shape, found[name].dtype) == (tensor.shape, tensor.dtype), name
        assert distance(found[name], tensor) <= within, name


# -- outputs and gradients ----------------------------------------------------------------------------------

KINDS: dict[str, dict[str, Any]] = {
    "no option": {},
    "bias of the base": {"bias": True},
    "bias of the base trains": {"bias": True, "lora": {"bias": "all"}},
    "rank 1": {"lora": {"r": 1}},
    "rank above the width": {"lora": {"r": 32}},
    "rslora": {"lora": {"use_rslora": True}},
    "bias of the adapter": {"bias": True, "lora": {"lora_bias": True}},
    "dora": {"lora": {"use_dora": True}},
    "dora over a bias": {"bias": True, "lora": {"use_dora": True}},
    "a layer with a forward of its own": {"kind": Doubling},
}
kinds = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


def make_kind(kind: dict[str, Any], **more: Any) -> tuple[PeftModel, PeftModel]:
    settings = dict(kind)
    return pair(**{**settings.pop("lora", {}), **settings, **more})


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@kinds
def test_outputs_and_gradients_are_pefts(kind: dict[str, Any], shape: tuple[int, ...]) -> None:
    theirs, ours = make_kind(kind)
    assert_same(step(ours, shape), step(theirs, shape))


@pytest.mark.parametrize("training", [True, False])
@kinds
def test_dropout_is_pefts(kind: dict[str, Any], training: bool) -> None:
    theirs, ours = (model.train(training) for model in make_kind(kind, lora_dropout=0.4))
    found = step(ours)
    assert_same(found, step(theirs))
    undropped = step(make_kind(kind)[1])["output"]
    assert torch.equal(found["output"], undropped) is not training


@kinds
def test_a_disabled_adapter_is_the_base(kind: dict[str, Any]) -> None:
    theirs, ours = make_kind(kind)
    before = step(ours)
    with theirs.disable_adapter(), ours.disable_adapter():
        assert_same(step(ours), step(theirs))
        assert not torch.equal(step(ours)["output"], before["output"])
    assert_same(step(ours), before, 0)


@kinds
def test_merged_and_unmerged_is_pefts(kind: dict[str, Any]) -> None:
    theirs, ours = make_kind(kind)
    apart = step(ours)
    for model in (theirs, ours):
        model.merge_adapter()
    merged = step(ours)
    assert_same(merged, step(theirs), 0)
    assert "base_model.model.proj.lora_A.default.weight" not in merged
    if kind.get("kind") is not Doubling:  # there PEFT's merged layer doubles the adapter too
        assert distance(merged["output"], apart["output"]) < 1e-5
    for model in (theirs, ours):
        model.unmerge_adapter()
    assert_same(step(ours), step(theirs))


@kinds
def test_merging_for_good_gives_pefts_weights(kind: dict[str, Any]) -> None:
    merged = [model.merge_and_unload(safe_merge=True) for model in make_kind(kind)]
    assert type(merged[1].proj) is type(merged[0].proj) is kind.get("kind", nn.Linear)
    states = [model.state_dict() for model in merged]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


def test_a_weight_that_trains_gets_pefts_gradient() -> None:
    models = pair(bias=True, lora_dropout=0.4)
    for model in models:
        layer(model).base_layer.requires_grad_()
    found = step(models[1])
    assert {"base_model.model.proj.base_layer.weight", "base_model.model.proj.base_layer.bias"} <= found.keys()
    assert_same(found, step(models[0]))


@pytest.mark.parametrize("frozen", ["lora_A", "lora_B"])
def test_a_frozen_half_gets_no_gradient(frozen: str) -> None:
    models = pair()
    for model in models:
        getattr(layer(model), frozen).requires_grad_(False)
    found = step(models[1])
    assert not any(frozen in name for name in found)
    assert_same(found, step(models[0]))


# -- several adapters ---------------------------------------------------------------------------------------


def add_second(model: PeftModel) -> None:
    config = LoraConfig(r=2, lora_alpha=10, target_modules=["proj"], init_lora_weights=False)
    torch.manual_seed(3)
    model.add_adapter("second", config)


@pytest.mark.parametrize("active", [["default"], ["second"], ["default", "second"]], ids="+".join)
def test_any_active_adapters_are_pefts(active: list[str]) -> None:
    models = pair()
    for model in models:
        add_second(model)
        model.base_model.set_adapter(active)
    found = step(models[1])
    assert {name.split(".")[-2] for name in found if "lora_A" in name} == set(active)
    assert_same(found, step(models[0]))


def test_an_adapter_that_is_on_other_layers_only_leaves_the_base() -> None:
    models = pair()
    config = LoraConfig(r=2, target_modules=["out"], init_lora_weights=False)
    for model in models:
        torch.manual_seed(3)
        model.add_adapter("second", config)
        model.base_model.set_adapter("second")
    assert_same(step(models[1]), step(models[0]))


@pytest.mark.parametrize("active", ["default", "second"])
def test_a_second_adapter_of_another_kind_goes_pefts_way(active: str) -> None:
    models = pair()
    for model in models:
        torch.manual_seed(3)
        model.add_adapter("second", LoraConfig(r=2, target_modules=["proj"], use_dora=True, init_lora_weights=False))
        model.base_model.set_adapter(active)
    assert_same(step(models[1]), step(models[0]))


def test_rows_with_adapters_of_their_own_are_pefts() -> None:
    models = pair()
    x = torch.randn(3, NARROW, generator=torch.Generator().manual_seed(1))
    out = []
    for model in models:
        add_second(model)
        model.eval()
        with torch.no_grad():
            out.append(model(x, adapter_names=["default", "__base__", "second"]))
    torch.testing.assert_close(out[1], out[0])


def test_a_scale_that_was_changed_is_followed() -> None:
    models = pair()
    before = step(models[1])["output"]
    for model in models:
        layer(model).scale_layer(3.0)
    assert_same(step(models[1]), step(models[0]))
    assert not torch.equal(step(models[1])["output"], before)


# -- dtypes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True])
def test_float64_is_pefts(bias: bool) -> None:
    theirs, ours = pair(bias, torch.float64)
    for model in (theirs, ours):
        model.double()
    found = step(ours, dtype=torch.float64)
    assert all(tensor.dtype == torch.float64 for tensor in found.values())
    assert_same(found, step(theirs, dtype=torch.float64), 1e-7)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("autocast", [True, False])
def test_float32_adapters_on_a_bfloat16_base(autocast: bool, bias: bool) -> None:
    """dtypes as PEFT's, and no further from float32 than under autocast, as Trainer runs PEFT."""
    theirs, ours = pair(bias, torch.bfloat16)
    exact, _ = pair(bias)
    exact.load_state_dict(theirs.state_dict())
    assert layer(ours).lora_A["default"].weight.dtype == torch.float32
    truth = step(exact)
    with torch.autocast("cpu", torch.bfloat16):
        trainers = step(theirs, (7, NARROW), torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = step(ours, (7, NARROW), torch.bfloat16)
    assert {n: t.dtype for n, t in found.items()} == {n: t.dtype for n, t in trainers.items()}
    for name, tensor in found.items():
        assert distance(tensor, truth[name]) < max(1.5 * distance(trainers[name], truth[name]), 1e-2), name


@pytest.mark.parametrize("bias", [False, True])
def test_autocast_over_float32_is_pefts(bias: bool) -> None:
    theirs, ours = pair(bias)
    with torch.autocast("cpu", torch.bfloat16):
        found, wanted = step(ours), step(theirs)
    assert found["output"].dtype == torch.bfloat16
    assert_same(found, wanted, 2e-2)


# -- what is registered and saved ---------------------------------------------------------------------------


def test_only_linear_layers_are_fused() -> None:
    class Mixed(Net):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(5, NARROW)
            self.conv = nn.Conv1d(NARROW, NARROW, 1)

    model = make(Mixed, True, torch.float32, target_modules=["proj", "embed", "conv"])
    base: Any = model.get_base_model()
    assert [type(part).__name__ for part in (base.proj, base.embed, base.conv)] == [
        "FusedLinear",
        "Embedding",
        "Conv1d",
    ]


def test_what_is_saved_is_plain_peft(tmp_path: Path) -> None:
    theirs, ours = pair()
    assert get_peft_model_state_dict(theirs).keys() == get_peft_model_state_dict(ours).keys()
    configs = []
    for name, model in (("theirs", theirs), ("ours", ours)):
        model.save_pretrained(str(tmp_path / name))
        configs.append(json.loads((tmp_path / name / "adapter_config.json").read_text()))
    assert configs[0] == configs[1]
    base = Net()
    base.load_state_dict(base_state(ours))
    loaded = PeftModel.from_pretrained(base, str(tmp_path / "ours"), is_trainable=True)
    assert type(layer(loaded)) is Linear
    assert_same(step(loaded.eval()), step(ours.eval()))


def base_state(model: PeftModel) -> dict[str, Tensor]:
    """The base's own tensors under their own names."""
    state = model.get_base_model().state_dict()
    return {name.replace("base_layer.", ""): tensor for name, tensor in state.items() if "lora_" not in name}


def test_one_function_stands_for_base_and_adapter() -> None:
    """And keeps no more than the input and x Aᵀ besides the parameters."""
    theirs, ours = pair(lora_dropout=0.0)
    kept = []
    for model in (theirs, ours):
        sizes: list[int] = []
        parameters = {p.data_ptr() for p in model.parameters()}

        def pack(tensor: Tensor, sizes: list[int] = sizes, parameters: set[int] = parameters) -> Tensor:
            if tensor.data_ptr() not in parameters:
                sizes.append(tensor.numel())
            return tensor

        x = torch.randn(7, NARROW)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            layer(model)(x)
        kept.append(sorted(sizes))
    assert kept[1] == [7 * 4, 7 * NARROW]
    assert sum(kept[1]) <= sum(kept[0])
