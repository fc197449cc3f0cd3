"""PEFT's LoRA layer on `phinetune.lora`'s one function; registered with a `LoraConfig`, not patched in."""

from __future__ import annotations

from typing import Any

from peft import LoraConfig
from peft.tuners.lora.layer import Linear, LoraLayer
from torch import Tensor, nn

from phinetune.engine.kernels.matmul import linear
from phinetune.lora.functional import lora_linear


class FusedLinear(Linear):
    """PEFT's `Linear`, base product and adapter in one function with its own backward.

    Whatever is more than one plain adapter (a variant such as DoRA, several active adapters, a bias of the
    adapter's own, adapters merged or switched off) goes PEFT's way.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        base: Any = self.base_layer
        if not (args or kwargs) and base_alone(self, nn.Linear):
            return linear(x, base.weight, base.bias)
        name = None if args or kwargs else only_adapter(self, nn.Linear)
        if name is None:
            return super().forward(x, *args, **kwargs)
        a: Any = self.lora_A[name].weight
        b: Any = self.lora_B[name].weight
        return lora_linear(x, base.weight, base.bias, a, b, self.scaling[name], dropped(self, name, x))


def only_adapter(layer: LoraLayer, base: type[nn.Module]) -> str | None:
    """The one active adapter of a layer, if it is a plain one on exactly this kind of base."""
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    if len(names) != 1 or layer.disable_adapters or layer.merged or type(layer.base_layer) is not base:
        return None
    name = names[0]
    return None if name in layer.lora_variant or layer.lora_bias[name] else str(name)


def base_alone(layer: LoraLayer, base: type[nn.Module]) -> bool:
    """Whether the adapters are switched off over exactly this kind of base."""
    return layer.disable_adapters and not layer.merged and type(layer.base_layer) is base


def dropped(layer: LoraLayer, name: str, x: Tensor) -> Tensor | None:
    """What the adapter sees in place of x under dropout; None where that is x."""
    dropout = layer.lora_dropout[name]
    return dropout(x) if dropout.training and not isinstance(dropout, nn.Identity) else None


def use_fused_layers(config: LoraConfig, model: Any) -> LoraConfig:
    """Let PEFT put fused layers onto the linear layers of `model`; what is saved stays plain PEFT.

    Over 8-bit weights PEFT's own layer stays: bitsandbytes' product is one of its own there.
    """
    kinds: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: FusedLinear}
    if getattr(model, "is_loaded_in_8bit", False):
        return config
    if getattr(model, "is_loaded_in_4bit", False):
        from bitsandbytes.nn.modules import Linear4bit

        from phinetune.engine.lora_layers_4bit import FusedLinear4bit

        kinds = {Linear4bit: FusedLinear4bit, **kinds}
    config._register_custom_module(kinds)
    return config
