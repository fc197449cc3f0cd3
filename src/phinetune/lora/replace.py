"""Putting LoRA into a model that is there, and taking it out again."""

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
    """Replace the layers that match by adapted ones over the same weights, in place, and print what matched.

    Args:
        target_modules: a regular expression for whole names, or a list of names or their ends (`["fc1"]`).
        r: rank.
        enable_lora: make linear layers `MergedLinear` with these splits (and `splits=[…]` among the options).
        options: lora_alpha, lora_dropout, use_rslora, …, as the layers take them.

    Returns:
        The names of the replaced layers.

    Raises:
        ValueError: nothing matches, or a name in the list matches nothing.
    """
    modules = model.named_modules(remove_duplicate=False)
    layers = {n: m for n, m in modules if n and _kind(m) is not None and not isinstance(m, LoRALayer)}
    names = _matching(list(layers), target_modules)
    # All are made before any is put in: options that don't fit leave the model as it was.
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
    """The model with every adapted layer replaced by a plain torch layer that holds the update, in place."""
    if isinstance(model, LoRALayer):
        return model.unloaded()
    places: dict[LoRALayer, list[str]] = {}
    for name, layer in model.named_modules(remove_duplicate=False):
        if isinstance(layer, LoRALayer):
            places.setdefault(layer, []).append(name)
    while places:
        # Taken out of the dictionary, so that its memory is free once it is replaced.
        layer, names = places.popitem()
        plain = layer.unloaded()
        for name in names:
            _put(model, name, plain)
    return model


def _put(model: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, layer)


def _kind(layer: nn.Module) -> Any:
    if isinstance(layer, NonDynamicallyQuantizableLinear):
        # nn.MultiheadAttention's out_proj: its weight is read, it is never called, so an adapter would do nothing.
        return None
    return next((ours for theirs, ours in KINDS if isinstance(layer, theirs)), None)


def _matching(names: Sequence[str], targets: str | Sequence[str]) -> list[str]:
    known = f"; layers that can be adapted: {', '.join(names) or 'none'}"
    if isinstance(targets, str):
        found = [name for name in names if re.fullmatch(targets, name)]
        if not found:
            raise ValueError(f"the pattern {targets!r} matches no layer{known}")
        return found
    lost = [t for t in targets if not any(name == t or name.endswith(f".{t}") for name in names)]
    if lost or not targets:
        raise ValueError(f"{', '.join(map(repr, lost)) or 'an empty list'} matches no layer{known}")
    return [name for name in names if any(name == t or name.endswith(f".{t}") for t in targets)]
