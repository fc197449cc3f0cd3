"""Put LoRA layers into an existing model, and take them out again."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from phinetune.lora.adoption import obstacle, take_over
from phinetune.lora.arguments import check_enable_lora
from phinetune.lora.base import LoRALayer
from phinetune.lora.conv import Conv1d, Conv2d, Conv3d
from phinetune.lora.linear import Embedding, Linear, MergedLinear

KINDS: dict[type[nn.Module], Any] = {
    nn.Linear: Linear,
    nn.Embedding: Embedding,
    nn.Conv1d: Conv1d,
    nn.Conv2d: Conv2d,
    nn.Conv3d: Conv3d,
}


def apply(
    model: nn.Module,
    target_modules: str | Sequence[str],
    r: int,
    *,
    enable_lora: Sequence[bool] | None = None,
    **options: Any,
) -> list[str]:
    """Replace, in place, the layers that match by adapted layers over the same weights. Print each replaced layer.

    Only layers of torch's own classes are replaced, as an adapted layer would not run the code of a subclass. A layer
    that can't be replaced is refused if the list names it; if it merely matches a pattern it stays, and a line says so.
    An adapted layer takes over the hooks, the attributes and the parameters of the old one, so what was tied stays
    tied. Its weight is frozen, but for a weight that is tied to a layer without an adapter.

    If anything does not fit one of the layers, no layer is replaced.

    Args:
        target_modules: a regular expression that matches whole names, or a list of names or ends of names (`["fc1"]`).
        r: rank, 1 or more.
        enable_lora: replace linear layers by `MergedLinear` with these splits. `splits=[…]` among the options gives the
            rows of each split.
        options: lora_alpha, lora_dropout, use_rslora and other arguments of the layers.

    Returns:
        The names of the replaced layers.

    Raises:
        ValueError: no layer matches; the list has a name that matches no layer or a layer that can't be adapted; or an
            option does not fit. The message names all of them.
    """
    _check_effect(r, enable_lora, options)
    modules = dict(model.named_modules(remove_duplicate=False))
    layers = {name: layer for name, layer in modules.items() if name and _plain_class(layer)}
    reasons = {name: reason for name, layer in layers.items() if (reason := obstacle(layer, _plain_class(layer)))}
    names, left = _matching(modules, list(layers), target_modules, reasons)
    made = _adapted({name: layers[name] for name in names}, r, enable_lora, options)
    for name in names:
        layer = layers[name]
        _put(model, name, made[layer])
        print(f"{name}: {type(layer).__name__} -> lora.{type(made[layer]).__name__}, r={r}")
    for name in left:
        print(f"{name} {reasons[name]}; it stays as it is")
    for name in layers.keys() - set(names):
        if layers[name] in made:
            print(f"{name} is the same layer as one of these, but target_modules does not name it; it stays as it is")
    _share_parameters(model, made)
    return names


def _check_effect(r: Any, enable_lora: Any, options: Mapping[str, Any]) -> None:
    """Refuse numbers with which the adapters would have no effect, though a single layer may have them.

    Raises:
        ValueError: naming the argument.
    """
    if r == 0:
        raise ValueError("r is 0, so no layer would get an adapter: give a rank of 1 or more")
    if options.get("lora_alpha") == 0:
        raise ValueError("lora_alpha is 0, so the adapters would have no effect: give another number")
    if enable_lora is not None:
        check_enable_lora(enable_lora)
        if not any(enable_lora):
            raise ValueError("enable_lora is False for each split, so no split would get an adapter")


def _adapted(
    layers: Mapping[str, nn.Module], r: int, enable_lora: Sequence[bool] | None, options: Mapping[str, Any]
) -> dict[nn.Module, LoRALayer]:
    """The adapted layer for each layer. All are made before the first one is replaced.

    Raises:
        ValueError: an option does not fit.
    """
    if enable_lora is not None and not any(isinstance(layer, nn.Linear) for layer in layers.values()):
        raise ValueError(f"enable_lora is for linear layers, but {', '.join(layers)} is none")
    made: dict[nn.Module, LoRALayer] = {}
    problems: list[str] = []
    for name, layer in layers.items():
        if layer in made:
            continue
        mode, layer.training = layer.training, True  # a merge now would be of a weight that is replaced below
        try:
            if enable_lora is not None and isinstance(layer, nn.Linear):
                made[layer] = MergedLinear.from_base(layer, r, enable_lora, **options)
            else:
                made[layer] = KINDS[type(layer)].from_base(layer, r, **options)
        except (TypeError, ValueError) as error:
            problems.append(f"{name}: {error}")
        finally:
            layer.training = mode
    if problems:
        raise ValueError("no layer was replaced, as the options don't fit:\n" + "\n".join(problems))
    return made


def _share_parameters(model: nn.Module, made: Mapping[nn.Module, LoRALayer]) -> None:
    """Give each new layer the very weight of the old one. Freeze it, unless a layer without an adapter has it too."""
    for old, new in made.items():
        new.weight = old._parameters["weight"]  # type: ignore[assignment]
    plain = (m for m in model.modules() if not (isinstance(m, LoRALayer) and m.has_adapter))
    held = {id(parameter) for module in plain for parameter in module.parameters(recurse=False)}
    for old, new in made.items():
        if id(new.weight) not in held:
            new.weight.requires_grad_(False)
        new.train(old.training)


def unload(model: nn.Module) -> nn.Module:
    """Replace, in place, every adapted layer by a layer of torch's own class with the update in its weight.

    The new layer takes over the hooks, the attributes and the bias of the old one, and its weight too if there is no
    adapter. A merged weight is a new parameter: it is no longer tied to another layer's.

    Returns:
        the model. If the model is itself an adapted layer, the new layer.

    Raises:
        ValueError: a layer is a subclass of one of this package's classes, whose code would be lost, and nothing was
            replaced; or as `LoRALayer.merge`.
    """
    places: dict[LoRALayer, list[str]] = {}
    for name, layer in model.named_modules(remove_duplicate=False):
        if isinstance(layer, LoRALayer):
            places.setdefault(layer, []).append(name)
    _check_classes(places)
    if isinstance(model, LoRALayer):
        return _unloaded(model)
    while places:
        # The layer leaves the dictionary, so that its memory is freed as soon as it is replaced.
        layer, names = places.popitem()
        torch_layer = _unloaded(layer)
        for name in names:
            _put(model, name, torch_layer)
    return model


def _unloaded(layer: LoRALayer) -> nn.Module:
    """A layer of torch's own class that takes over what it can from an adapted one, which is not for use any more."""
    made = layer.unloaded()
    layer.remove_guard()
    take_over(layer, made)
    if getattr(layer, "bias", None) is not None:
        made.bias = layer.bias
    if not (layer.has_adapter or getattr(layer, "fan_in_fan_out", False)):
        made.weight = layer.weight
    return made


def _check_classes(places: Mapping[LoRALayer, Sequence[str]]) -> None:
    known = (*KINDS.values(), MergedLinear)
    problems = [
        f"{names[0] or 'the model'} is a {type(layer).__name__}, a subclass whose own code torch's layer would not run"
        for layer, names in places.items()
        if type(layer) not in known
    ]
    if problems:
        raise ValueError("no layer was unloaded:\n" + "\n".join(problems))


def _put(model: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, layer)


def _plain_class(layer: nn.Module) -> Any:
    """The class of torch's that a layer is of, directly or as a subclass; None if there are no adapters for it."""
    return next((plain for plain in KINDS if isinstance(layer, plain)), None)


def _matching(
    modules: Mapping[str, nn.Module],
    names: Sequence[str],
    targets: str | Sequence[str],
    reasons: Mapping[str, str],
) -> tuple[list[str], list[str]]:
    """The names that match: those of layers that can be adapted, and those of layers that a pattern leaves alone.

    Args:
        modules: all modules of the model, by name.
        names: those of layers that adapters exist for.
        reasons: why some of them can't be adapted.

    Raises:
        ValueError: as in `apply`.
    """
    free = [name for name in names if name not in reasons]
    known = f"; layers that can be adapted: {', '.join(free) or 'none'}"
    if isinstance(targets, str):
        found = [name for name in names if re.fullmatch(targets, name)]
        left = [name for name in found if name in reasons]
        if len(found) == len(left):
            raise ValueError(f"the pattern {targets!r} matches no layer{_why(left, reasons)}{known}")
        return [name for name in found if name not in reasons], left
    unmatched = [target for target in targets if not _ending_in([target], names)]
    if unmatched or not targets:
        others = {name: f"is a {type(modules[name]).__name__}" for name in _ending_in(unmatched, modules)}
        what = ", ".join(map(repr, unmatched)) or "an empty list"
        raise ValueError(f"{what} matches no layer{_why(others, others)}{known}")
    found = _ending_in(targets, names)
    refused = [name for name in found if name in reasons]
    if refused:
        raise ValueError(f"target_modules has layers that can't be adapted{_why(refused, reasons)}{known}")
    return found, []


def _ending_in(targets: Sequence[str], names: Iterable[str]) -> list[str]:
    """The names that are one of the targets, or end in one."""
    return [name for name in names if any(name == target or name.endswith(f".{target}") for target in targets)]


def _why(names: Iterable[str], reasons: Mapping[str, str]) -> str:
    """The names with their reasons, as the middle of a sentence; empty if there are none."""
    said = ", and ".join(f"{name} {reasons[name]}" for name in names)
    return f" ({said})" if said else ""
