"""What an adapted layer takes over from the layer that it replaces, and why some layers can't be replaced."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils.parametrize import is_parametrized

from phinetune.lora.base import OWN_ATTRIBUTES, LoRALayer

# The dictionaries of hooks that each module has. A handle of a hook refers to the dictionary that it is in.
_HOOKS = tuple(name for name in vars(nn.Module()) if "hook" in name)


def obstacle(layer: nn.Module, plain: type[nn.Module]) -> str | None:
    """Why an adapted layer can't take the place of `layer`; None if it can.

    An adapted layer computes what `plain`, torch's own class, computes. So `layer` has to be of that very class, with
    nothing on it that changes what it computes or that an adapted layer can't take over.

    Returns:
        the end of a sentence that begins with the layer's name.
    """
    if not isinstance(layer, plain):
        return f"is a {type(layer).__name__}, not an nn.{plain.__name__}"
    return _obstacle_of_class(layer, plain) or _obstacle_of_parameters(layer) or _obstacle_of_attributes(layer)


def _obstacle_of_class(layer: nn.Module, plain: type[nn.Module]) -> str | None:
    kind = type(layer).__name__
    if isinstance(layer, LoRALayer):
        return "has an adapter already"
    if isinstance(layer, NonDynamicallyQuantizableLinear):
        reader = "nn.MultiheadAttention, which reads its weight and never calls it"
        return f"is the out_proj of {reader}: an adapter there would have no effect"
    if is_parametrized(layer):
        return "has a parametrization: remove it first (torch.nn.utils.parametrize.remove_parametrizations)"
    if isinstance(layer, nn.modules.lazy.LazyModuleMixin):
        return f"is a {kind}, whose size is not known yet: pass a batch through the model first"
    if type(layer) is not plain:
        return f"is a {kind}, a subclass of nn.{plain.__name__}: an adapted layer would not run the subclass's own code"
    return None


def _obstacle_of_parameters(layer: nn.Module) -> str | None:
    held = [*layer._parameters, *layer._buffers, *layer._modules]
    extra = [name for name in held if name not in ("weight", "bias")]
    if extra:
        return (
            f"holds {', '.join(extra)} besides its weight and bias (by weight norm, spectral norm or pruning?): "
            "an adapted layer would not use that"
        )
    weight = layer._parameters.get("weight")
    if weight is None or type(weight) is not nn.Parameter or hasattr(weight, "_fsdp_flattened"):
        return (
            "has a weight that is no plain parameter (FSDP or a quantisation manages it?): adapt the model before that"
        )
    return None if weight.is_floating_point() else f"has a weight of {weight.dtype}"


def _obstacle_of_attributes(layer: nn.Module) -> str | None:
    own = vars(layer)
    replaced = [name for name in own if hasattr(type(layer), name)]
    if replaced:
        return f"has its own {', '.join(replaced)} (by torch.compile or accelerate?): adapt the model before that"
    taken = [name for name in own if name in OWN_ATTRIBUTES]
    if taken:
        return f"has the attribute {', '.join(taken)}, which means something else in an adapted layer"
    if layer._load_state_dict_pre_hooks:
        return "has a hook on loading, which torch binds to the layer itself: adapt the model before that"
    return None


def check_base(layer: nn.Module, plain: type[nn.Module]) -> None:
    """Refuse a layer that `obstacle` has something against.

    Raises:
        ValueError: with the reason.
    """
    reason = obstacle(layer, plain)
    if reason:
        raise ValueError(f"the layer {reason}")


def adopt(layer: LoRALayer, base: nn.Module) -> None:
    """Give `layer`, made on the meta device, what `base` has, and a newly initialised adapter.

    The bias is the base's own parameter. The weight shares the base's storage, but if the layer has an adapter it is a
    new, frozen parameter. So the base goes on training if it did.
    """
    source: Any = base
    weight = source.weight
    layer.weight = nn.Parameter(weight.detach(), requires_grad=False) if layer.has_adapter else weight
    if getattr(source, "bias", None) is not None:
        layer.bias = source.bias
    if layer.has_adapter:
        for name in ("lora_A", "lora_B"):
            setattr(layer, name, nn.Parameter(_empty_on(getattr(layer, name), weight)))
        layer.reset_lora_parameters()
    take_over(base, layer)
    layer.train(base.training)


def _empty_on(tensor: Tensor, other: Tensor) -> Tensor:
    return tensor.new_empty(tensor.shape, device=other.device)


def take_over(old: nn.Module, new: nn.Module) -> None:
    """Give `new` the hooks of `old`, and the attributes that someone has set on `old`.

    The two share the dictionaries of hooks, so a handle of a hook still removes it.
    """
    theirs, ours = vars(old), vars(new)
    ours.update({name: theirs[name] for name in _HOOKS})
    ours.update({name: value for name, value in theirs.items() if name not in ours and name not in OWN_ATTRIBUTES})
