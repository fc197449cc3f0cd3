"""What takes another layer's place takes over all that it had, or is refused with the reason."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from lora.lora_helpers import ALL, Kind
from phinetune import lora
from phinetune.lora.base import OWN_ATTRIBUTES


class Scaled(nn.Embedding):
    """As Gemma's and T5-like models' embeddings: torch's class with a forward of its own."""

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * 7


class Quiet(nn.Linear):
    pass


class Causal(nn.Conv1d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(nn.functional.pad(x, (2, 0)))


def weight_norm_of_old(layer: nn.Linear) -> nn.Linear:
    return nn.utils.weight_norm(layer)


def with_its_own_forward(layer: nn.Linear) -> nn.Linear:
    """accelerate's hooks do this."""
    layer.__dict__["forward"] = lambda x: x
    return layer


def compiled(layer: nn.Linear) -> nn.Linear:
    layer.compile(backend="eager")
    return layer


def with_a_hook_on_loading(layer: nn.Linear) -> nn.Linear:
    layer.register_load_state_dict_pre_hook(lambda *_: None)
    return layer


def with_attribute(name: str, value: Any) -> Any:
    def make(layer: nn.Linear) -> nn.Linear:
        setattr(layer, name, value)
        return layer

    return make


class Int8(nn.Parameter):
    """A stand-in for the parameters of quantised weights, which are subclasses."""


def quantised(layer: nn.Linear) -> nn.Linear:
    layer.weight = Int8(layer.weight.detach())
    return layer


def half_ints(layer: nn.Linear) -> nn.Linear:
    layer.weight = nn.Parameter(layer.weight.detach().to(torch.int8), requires_grad=False)
    return layer


def managed_by_fsdp(layer: nn.Linear) -> nn.Linear:
    layer.weight.__dict__["_fsdp_flattened"] = True
    return layer


SUBCLASSES: list[Any] = [
    (lambda: Scaled(7, 4), "is a Scaled, a subclass of nn.Embedding"),
    (lambda: Quiet(4, 4), "is a Quiet, a subclass of nn.Linear"),
    (lambda: Causal(4, 4, 3), "is a Causal, a subclass of nn.Conv1d"),
    (lambda: nn.LazyLinear(4), "is a LazyLinear, whose size is not known yet"),
    (lambda: nn.MultiheadAttention(4, 2).out_proj, "is the out_proj of nn.MultiheadAttention"),
    (lambda: lora.Linear(4, 4, r=1), "has an adapter already"),
]
OTHERWISE: list[Any] = [
    (parametrizations.orthogonal, "has a parametrization"),
    (parametrizations.weight_norm, "has a parametrization"),
    pytest.param(
        weight_norm_of_old,
        "holds weight_g, weight_v besides",
        marks=pytest.mark.filterwarnings("ignore::FutureWarning"),
    ),
    (nn.utils.spectral_norm, "holds weight_orig, weight_u, weight_v besides"),
    (lambda layer: prune.identity(layer, "weight"), "holds weight_orig, weight_mask besides"),
    (with_attribute("gate", nn.Parameter(torch.ones(1))), "holds gate besides"),
    (with_attribute("act", nn.ReLU()), "holds act besides"),
    (with_its_own_forward, "has its own forward"),
    (compiled, "has its own _compiled_call_impl"),
    (with_a_hook_on_loading, "has a hook on loading"),
    (with_attribute("scaling", 3), "has the attribute scaling, which means something else"),
    (quantised, "has a weight that is no plain parameter"),
    (managed_by_fsdp, "has a weight that is no plain parameter"),
    (half_ints, "has a weight of torch.int8"),
]
REFUSED = [
    *SUBCLASSES,
    *(
        pytest.param(lambda make=case.values[0]: make(nn.Linear(4, 4)), case.values[1], marks=case.marks)
        if hasattr(case, "values")
        else (lambda make=case[0]: make(nn.Linear(4, 4)), case[1])
        for case in OTHERWISE
    ),
]


def adapted_names(model: nn.Module) -> list[str]:
    return [name for name, layer in model.named_modules() if isinstance(layer, lora.LoRALayer) and layer.r == 2]


@pytest.mark.parametrize(("make", "says"), REFUSED)
def test_a_layer_that_an_adapter_would_change_is_refused_by_name(make: Any, says: str) -> None:
    model = nn.ModuleDict({"other": nn.Linear(4, 4), "odd": make()})
    with pytest.raises(ValueError, match=f"odd {says}"):
        lora.apply(model, ["other", "odd"], r=2)
    assert adapted_names(model) == []


@pytest.mark.parametrize(("make", "says"), REFUSED)
def test_a_pattern_leaves_such_a_layer_alone_and_says_so(make: Any, says: str, capsys: Any) -> None:
    odd = make()
    model = nn.ModuleDict({"other": nn.Linear(4, 4), "odd": odd})
    assert lora.apply(model, "o.*", r=2) == ["other"]
    assert model["odd"] is odd
    first, second = capsys.readouterr().out.splitlines()
    assert first == "other: Linear -> lora.Linear, r=2"
    assert second.startswith(f"odd {says}")
    assert second.endswith("; it stays as it is")


@pytest.mark.parametrize(("make", "says"), REFUSED)
def test_a_pattern_for_such_a_layer_alone_is_refused(make: Any, says: str) -> None:
    model = nn.ModuleDict({"other": nn.Linear(4, 4), "odd": make()})
    with pytest.raises(ValueError, match=rf"'odd' matches no layer \(odd {says}.*adapted: other$"):
        lora.apply(model, "odd", r=2)


@pytest.mark.parametrize(
    ("kind", "layer", "says"),
    [
        (lora.Embedding, Scaled(7, 4), "the layer is a Scaled"),
        (lora.Linear, nn.Embedding(7, 4), "the layer is a Embedding, not an nn.Linear"),
        (lora.Conv1d, nn.Conv2d(2, 2, 3), "the layer is a Conv2d, not an nn.Conv1d"),
        (lora.Embedding, nn.utils.spectral_norm(nn.Embedding(7, 4)), "holds weight_orig"),
    ],
)
def test_from_base_refuses_the_same(kind: Any, layer: nn.Module, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        kind.from_base(layer, 2)


def test_merged_linear_from_base_refuses_the_same() -> None:
    with pytest.raises(ValueError, match="is a Quiet"):
        lora.MergedLinear.from_base(Quiet(4, 4), 2, [True, False])


def test_a_name_of_another_module_is_refused_with_its_class() -> None:
    model = nn.ModuleDict({"fc": nn.Linear(4, 4), "rnn": nn.LSTM(4, 4), "mix": nn.Bilinear(2, 2, 2)})
    with pytest.raises(ValueError, match=r"'rnn', 'mix' matches no layer \(rnn is a LSTM, and mix is a Bilinear\)"):
        lora.apply(model, ["fc", "rnn", "mix"], r=2)


# -- hooks, attributes and parameters ---------------------------------------------------------------------------------

LAYERS: list[Any] = [
    (lambda: nn.Linear(4, 4), torch.ones(2, 4)),
    (lambda: nn.Embedding(7, 4), torch.tensor([[1, 2]])),
    (lambda: nn.Conv1d(4, 4, 3, padding=1), torch.ones(2, 4, 5)),
]


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize(("make", "x"), LAYERS)
def test_hooks_stay_through_apply_and_unload(make: Any, x: Tensor) -> None:
    """An activation's scale, a probe and a clipped gradient: dropped, they would change what is trained."""
    model = nn.Sequential(make(), nn.Identity())
    seen: list[str] = []
    model[0].register_forward_hook(lambda module, args, out: out * 3)
    model[0].register_forward_pre_hook(lambda module, args: seen.append("before"))
    model[0].register_full_backward_hook(lambda module, grad_in, grad_out: seen.append("backward"))
    model[0].register_state_dict_post_hook(lambda *_: seen.append("saved"))
    expected = model(x)
    lora.apply(model, ["0"], r=2)
    for _ in range(2):
        seen.clear()
        torch.testing.assert_close(model(x), expected)
        model(x).sum().backward()
        model.state_dict()
        assert seen == ["before", "before", "backward", "saved"]
        lora.unload(model)


@pytest.mark.parametrize(("make", "x"), LAYERS)
def test_a_handle_still_removes_its_hook(make: Any, x: Tensor) -> None:
    model = nn.Sequential(make())
    expected = model(x)
    handle = model[0].register_forward_hook(lambda module, args, out: out * 3)
    lora.apply(model, ["0"], r=2)
    torch.testing.assert_close(model(x), expected * 3)
    handle.remove()
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("make", "x"), LAYERS)
def test_attributes_stay_through_apply_and_unload(make: Any, x: Tensor, training: bool) -> None:
    """transformers marks the layers that it has initialised; other code keeps names and groups there."""
    model: Any = nn.Sequential(make()).train(training)
    model[0]._is_hf_initialized = True
    model[0].tag = {"group": 1}
    tag, names = model[0].tag, set(vars(model[0]))
    lora.apply(model, ["0"], r=2, merge_weights=False)
    assert model[0].tag is tag
    assert model[0]._is_hf_initialized
    lora.unload(model)
    assert model[0].tag is tag
    assert set(vars(model[0])) == names
    assert not model[0]._forward_pre_hooks
    assert model[0].training is training


@pytest.mark.parametrize("kind", ALL, ids=str)
def test_the_list_of_own_attributes_is_whole(kind: Kind) -> None:
    layer = kind.ours().eval()
    assert set(vars(layer)) - set(vars(layer.unloaded())) <= OWN_ATTRIBUTES


def test_every_own_attribute_is_one() -> None:
    layers: list[Any] = [lora.MergedLinear(2, 2, r=1, enable_lora=[True]), lora.Linear(2, 2, r=1)]
    assert all(any(hasattr(layer, name) for layer in layers) for name in OWN_ATTRIBUTES)


def test_settings_of_an_embedding_stay() -> None:
    options = {"padding_idx": 1, "max_norm": 0.5, "norm_type": 1.0, "scale_grad_by_freq": True, "sparse": False}
    model = nn.Sequential(nn.Embedding(7, 4, **options))  # type: ignore[arg-type]
    ids = torch.tensor([[1, 2, 2]])
    expected = model(ids)
    lora.apply(model, ["0"], r=2)
    assert {name: getattr(model[0], name) for name in options} == options
    torch.testing.assert_close(model(ids), expected)


# -- tied weights -----------------------------------------------------------------------------------------------------


def tied(bias: bool = False) -> nn.ModuleDict:
    model = nn.ModuleDict({"embed": nn.Embedding(8, 4), "head": nn.Linear(4, 8, bias=bias)})
    model["head"].weight = model["embed"].weight
    return model


@pytest.mark.parametrize("targets", [["head"], ["embed"], ["embed", "head"]], ids=str)
def test_tied_weights_stay_one_parameter(targets: list[str]) -> None:
    model = tied()
    parameter = model["embed"].weight
    lora.apply(model, targets, r=2)
    assert model["embed"].weight is model["head"].weight is parameter
    model.double()
    assert model["embed"].weight is model["head"].weight


@pytest.mark.parametrize(("targets", "trains"), [(["head"], True), (["embed"], True), (["embed", "head"], False)])
def test_a_tied_weight_trains_while_a_layer_without_an_adapter_has_it(targets: list[str], trains: bool) -> None:
    model = tied()
    lora.apply(model, targets, r=2)
    assert model["embed"].weight.requires_grad is trains
    lora.mark_only_lora_as_trainable(model)
    assert not model["embed"].weight.requires_grad


def test_a_frozen_tied_weight_stays_frozen() -> None:
    model = tied().requires_grad_(False)
    lora.apply(model, ["head"], r=2)
    assert not model["embed"].weight.requires_grad


def test_a_shared_bias_stays_one_parameter_through_apply_and_unload() -> None:
    """As two parameters over one storage, an optimizer would step twice."""
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    model["a"].bias = model["b"].bias
    lora.apply(model, ["a"], r=2)
    assert model["a"].bias is model["b"].bias
    lora.unload(model)
    assert model["a"].bias is model["b"].bias


def test_unload_keeps_a_tied_weight_without_an_adapter_tied() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(8, 4), "head": lora.Linear(4, 8), "turned": lora.Linear(4, 8)})
    model["turned"] = lora.Linear(4, 8, fan_in_fan_out=True)
    model["head"].weight = model["embed"].weight
    x = torch.ones(1, 4)
    expected = model["turned"](x)
    lora.unload(model)
    assert type(model["head"]) is nn.Linear
    assert model["head"].weight is model["embed"].weight
    torch.testing.assert_close(model["turned"](x), expected)


@pytest.mark.parametrize("targets", [["head"], ["embed", "head"]], ids=str)
def test_unload_of_tied_layers_gives_each_its_own_sum(targets: list[str]) -> None:
    model: Any = tied().double()
    lora.apply(model, targets, r=2)
    for name in targets:
        nn.init.normal_(model[name].lora_A)
        nn.init.normal_(model[name].lora_B)
    ids, x = torch.tensor([[1, 2]]), torch.randn(2, 4, dtype=torch.float64)
    expected = model["embed"](ids), model["head"](x)
    lora.unload(model)
    torch.testing.assert_close((model["embed"](ids), model["head"](x)), expected, rtol=1e-6, atol=1e-6)


def test_a_second_name_of_a_replaced_layer_is_named(capsys: Any) -> None:
    model = nn.ModuleDict({"shared": nn.Embedding(7, 4)})
    model["decoder"] = model["shared"]
    lora.apply(model, ["shared"], r=2)
    assert type(model["decoder"]) is nn.Embedding
    assert capsys.readouterr().out.splitlines()[1].startswith("decoder is the same layer as one of these")


def test_unload_refuses_a_subclass_whose_code_would_be_lost() -> None:
    class Twice(lora.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    model = nn.ModuleDict({"a": lora.Linear(2, 2, r=2), "b": Twice(2, 2, r=2)})
    with pytest.raises(ValueError, match=r"no layer was unloaded:\nb is a Twice"):
        lora.unload(model)
    assert adapted_names(model) == ["a", "b"]
    with pytest.raises(ValueError, match="the model is a Twice"):
        lora.unload(model["b"])


# -- options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"r": 0}, "r is 0"),
        ({"lora_alpha": 0}, "lora_alpha is 0"),
        ({"enable_lora": [False, False]}, "enable_lora is False for each split"),
        ({"enable_lora": True}, "enable_lora must be a list"),
        ({"enable_lora": "qkv"}, "enable_lora must be a list"),
        ({"r": -1}, "a: r must be 0 .*\nb: r must be 0"),
        ({"r": 2.5}, "whole number, not 2.5"),
        ({"fan_in_fan_out": True}, "a: fan_in_fan_out: an nn.Linear stores"),
        ({"enable_lora": [True, False], "fan_in_fan_out": True}, "a: fan_in_fan_out"),
        ({"alpha": 3}, "a: .*unexpected keyword argument 'alpha'"),
        ({"bias": False}, "a: .*multiple values for keyword argument 'bias'"),
        ({"target": "c", "enable_lora": [True]}, "enable_lora is for linear layers, but c is none"),
        ({"target": "c", "lora_dropout": 0.1}, "c: .*unexpected keyword argument 'lora_dropout'"),
    ],
    ids=str,
)
def test_options_without_an_effect_or_that_do_not_fit_are_refused(options: dict[str, Any], says: str) -> None:
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4), "c": nn.Embedding(3, 4)})
    options = {"r": 2, **options}
    with pytest.raises(ValueError, match=says):
        lora.apply(model, options.pop("target", "[ab]"), **options)
    assert [name for name, layer in model.items() if isinstance(layer, lora.LoRALayer)] == []
