"""Put LoRA layers into an existing model, and take them out again."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from phinetune.lora.base import LoRALayer
from phinetune.lora.conv import Conv1d, Conv2d, Conv3d
from phinetune.lora.linear import Embedding, Linear, MergedLinear

KINDS: tuple[tuple[type[nn.Module], Any], ...] = (
    (nn.Linear, Linear),
    (nn.Embedding, Embedding),
    (nn.Conv1d, Conv1d),
    (nn.Conv2d, Conv2d),
    (nn.Conv3d, Conv3d),
)


def apply(
    model: nn.Module,
    target_modules: str | Sequence[str],
    r: int,
    *,
    enable_lora: Sequence[bool] | None = None,
    **options: Any,
) -> list[str]:
    """Replace, in place, the layers that match by adapted layers over the same weights. Print each replaced layer.

    If the options do not fit one of the layers, no layer is replaced.

    Args:
        target_modules: a regular expression that matches whole names, or a list of names or ends of names (`["fc1"]`).
        r: rank.
        enable_lora: replace linear layers by `MergedLinear` with these splits. `splits=[…]` among the options gives the
            rows of each split.
        options: lora_alpha, lora_dropout, use_rslora and other arguments of the layers.

    Returns:
        The names of the replaced layers.

    Raises:
        ValueError: no layer matches, a name in the list matches no layer, or an option does not fit.
    """
    modules = model.named_modules(remove_duplicate=False)
    layers = {n: m for n, m in modules if n and _kind(m) is not None and not isinstance(m, LoRALayer)}
    names = _matching(list(layers), target_modules)
    # All layers are made before the first one is replaced. So options that do not fit leave the model unchanged.
    made: dict[nn.Module, nn.Module] = {}
    for name in names:
        layer = layers[name]
        if layer in made:
            continue
        if enable_lora is not None and isinstance(layer, nn.Linear):
            made[layer] = MergedLinear.from_base(layer, r, enable_lora, **options)
        else:
            made[layer] = _kind(layer).from_base(layer, r, **options)
    for name in names:
        layer = layers[name]
        _put(model, name, made[layer])
        print(f"{name}: {type(layer).__name__} -> lora.{type(made[layer]).__name__}, r={r}")
    return names


def unload(model: nn.Module) -> nn.Module:
    """Replace, in place, every adapted layer by a layer of torch's own class with the update in its weight.

    Returns:
        the model. If the model is itself an adapted layer, the new layer.

    Raises:
        ValueError: as `LoRALayer.merge`.
    """
    if isinstance(model, LoRALayer):
        return model.unloaded()
    places: dict[LoRALayer, list[str]] = {}
    for name, layer in model.named_modules(remove_duplicate=False):
        if isinstance(layer, LoRALayer):
            places.setdefault(layer, []).append(name)
    while places:
        # The layer leaves the dictionary, so that its memory is freed as soon as it is replaced.
        layer, names = places.popitem()
        torch_layer = layer.unloaded()
        for name in names:
            _put(model, name, torch_layer)
    return model


def _put(model: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, layer)


def _kind(layer: nn.Module) -> Any:
    """The adapted class for a layer; None if it can't be adapted."""
    if isinstance(layer, NonDynamicallyQuantizableLinear):
        # This is the out_proj of nn.MultiheadAttention, which reads its weight but never calls it. An adapter there
        # would have no effect.
        return None
    return next((ours for theirs, ours in KINDS if isinstance(layer, theirs)), None)


def _matching(names: Sequence[str], targets: str | Sequence[str]) -> list[str]:
    """The names that match.

    Raises:
        ValueError: as in `apply`.
    """
    known = f"; layers that can be adapted: {', '.join(names) or 'none'}"
    if isinstance(targets, str):
        found = [name for name in names if re.fullmatch(targets, name)]
        if not found:
            raise ValueError(f"the pattern {targets!r} matches no layer{known}")
        return found
    unmatched = [t for t in targets if not any(name == t or name.endswith(f".{t}") for name in names)]
    if unmatched or not targets:
        raise ValueError(f"{', '.join(map(repr, unmatched)) or 'an empty list'} matches no layer{known}")
    return [name for name in names if any(name == t or name.endswith(f".{t}") for t in targets)]
