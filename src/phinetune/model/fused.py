"""PEFT's LoRA layer on `phinetune.lora`'s one function; registered with a `LoraConfig`, not patched in."""

from __future__ import annotations

from typing import Any

from peft import LoraConfig
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn

from phinetune.lora.functional import lora_linear


class FusedLinear(Linear):
    """PEFT's `Linear`, base product and adapter in one function with its own backward.

    Whatever is more than one plain adapter (a variant such as DoRA, several active adapters, a bias of the
    adapter's own, adapters merged or switched off) goes PEFT's way.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        adapter = self._only_adapter() if not args and not kwargs else None
        if adapter is None:
            return super().forward(x, *args, **kwargs)
        dropout = self.lora_dropout[adapter]
        seen = dropout(x) if dropout.training and not isinstance(dropout, nn.Identity) else None
        base: Any = self.base_layer
        a: Any = self.lora_A[adapter].weight
        b: Any = self.lora_B[adapter].weight
        return lora_linear(x, base.weight, base.bias, a, b, self.scaling[adapter], seen)

    def _only_adapter(self) -> str | None:
        """The one active adapter, if it is a plain one on a plain linear layer."""
        names = [name for name in self.active_adapters if name in self.lora_A]
        if len(names) != 1 or self.disable_adapters or self.merged or type(self.base_layer) is not nn.Linear:
            return None
        name = names[0]
        return None if name in self.lora_variant or self.lora_bias[name] else str(name)


def use_fused_layers(config: LoraConfig) -> LoraConfig:
    """Let PEFT put `FusedLinear` onto linear layers; what is saved stays plain PEFT."""
    config._register_custom_module({nn.Linear: FusedLinear})
    return config
