"""Where LoRA goes: target modules by either naming, and the layers that they match."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from phinetune.errors import ConfigError

ALL_LINEAR = "all-linear"


# The cookbook's examples name the split projections of other models. Phi-3's own form has them fused into one layer.
FUSED = {
    "q_proj": "qkv_proj",
    "k_proj": "qkv_proj",
    "v_proj": "qkv_proj",
    "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
}


# The split layers of each fused layer, in the order of its rows.
PARTS = {fused: tuple(part for part, name in FUSED.items() if name == fused) for fused in dict.fromkeys(FUSED.values())}


@dataclasses.dataclass(frozen=True)
class AdaptedLayers:
    """Linear layers of the same name and shape that have an adapter.

    Attributes:
        name: the last part of the layers' names.
        count: how many layers there are.
        in_features, out_features: the shape of each layer's weight is (out_features, in_features).
        rank: the adapter's rank r.
    """

    name: str
    count: int
    in_features: int
    out_features: int
    rank: int

    @property
    def parameters(self) -> int:
        """The number of parameters of A (r × in) and B (out × r) in all `count` layers together."""
        return self.count * self.rank * (self.in_features + self.out_features)


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """Every linear layer by its full name. The output head is left out, because it gets no adapter."""
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear) and layer is not head}


def resolve_targets(model: nn.Module, wanted: Any) -> Any:
    """Translate `target_modules` into names of this model's layers.

    Args:
        wanted: a list of names, a regular expression, `all-linear`, or None.

    Returns:
        a list in which the model's own names replace those of the other form (`qkv_proj`, or `q_proj` and so on), the
        regular expression, or `all-linear` (also for None).

    Raises:
        ConfigError: a name or the pattern matches no linear layer, or the pattern matches the output head.
    """
    if wanted is None or wanted == ALL_LINEAR:
        return ALL_LINEAR
    layers = linear_layers(model)
    last_names = {name.rsplit(".", 1)[-1] for name in layers}
    if isinstance(wanted, str):
        return _resolve_pattern(wanted, layers, last_names, _head_name(model))
    names = list(dict.fromkeys(own for name in wanted for own in _own_names(name, last_names)))
    problems = [
        f"peft_config.target_modules: `{name}` matches no linear layer; there are {', '.join(sorted(last_names))}"
        for name in names
        if not any(layer == name or layer.endswith(f".{name}") for layer in layers)
    ]
    if problems or not names:
        raise ConfigError(problems or "peft_config.target_modules: the list is empty")
    return names


def _head_name(model: nn.Module) -> str | None:
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    return next((name for name, layer in model.named_modules() if layer is head), None)


def _resolve_pattern(pattern: str, layers: Mapping[str, nn.Linear], last_names: set[str], head: str | None) -> str:
    try:
        matched = any(re.fullmatch(pattern, name) for name in layers)
        # The loss reads the head's weight directly, so an adapter on the head would do nothing.
        if head and re.fullmatch(pattern, head):
            raise ConfigError(
                f"peft_config.target_modules: the pattern `{pattern}` matches {head}, and the head is not adapted"
            )
    except re.error as error:
        raise ConfigError(f"peft_config.target_modules: `{pattern}` is no regular expression: {error}") from None
    if not matched:
        raise ConfigError(
            f"peft_config.target_modules: the pattern `{pattern}` matches no linear layer; there are "
            f"{', '.join(sorted(last_names))} (a list of names is written with brackets)"
        )
    return pattern


def _own_names(name: str, last_names: set[str]) -> list[str]:
    """The model's own names for a layer that may be named as in the other form."""
    path, _, last = name.rpartition(".")
    others = [FUSED[last]] if last in FUSED else list(PARTS.get(last, ()))
    if last in last_names or not last_names.issuperset(others):
        return [name]
    return [f"{path}.{other}".lstrip(".") for other in others] or [name]


def matched_targets(model: PeftModel) -> list[AdaptedLayers]:
    """The layers of a model that have an adapter, grouped by name and shape."""
    from peft.tuners.lora import LoraLayer

    counts: dict[tuple[str, int, int, int], int] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            rank = next(iter(layer.r.values()))
            fan_in, fan_out = int(layer.in_features or 0), int(layer.out_features or 0)
            key = (name.rsplit(".", 1)[-1], fan_in, fan_out, rank)
            counts[key] = counts.get(key, 0) + 1
    return [
        AdaptedLayers(name, count, fan_in, fan_out, rank) for (name, fan_in, fan_out, rank), count in counts.items()
    ]


def trainable_parameters(model: nn.Module) -> tuple[int, int]:
    """The number of trainable parameters, and the number of all parameters."""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(n for n, trains in sizes if trains), sum(n for n, _ in sizes)
