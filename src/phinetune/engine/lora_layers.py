"""PEFT's LoRA layer, computed by one function of `phinetune.lora`. A `LoraConfig` registers it; PEFT is not patched."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora.layer import Linear, LoraLayer
from torch import Tensor, nn

from phinetune.engine.kept_memory import trim_heap
from phinetune.engine.kernels.matmul import HALF_DTYPES, BlockReader, linear, product_dtype
from phinetune.engine.q8_linear import ANSWERING
from phinetune.engine.side_by_side import SideBySide
from phinetune.errors import ModelError
from phinetune.lora import one_product
from phinetune.lora.functional import Projection, lora_linear


class FusedLinear(Linear):
    """PEFT's `Linear`, with base product and adapter in one function that has its own backward.

    It computes one active LoRA adapter, or the base alone if adapters are switched off. PEFT's own forward computes the
    rest: variants such as DoRA, several active adapters, an adapter with a bias of its own, and merged adapters.
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

    def merge(self, *args: Any, **kwargs: Any) -> None:
        """Merge as PEFT does.

        Raises:
            ModelError: the sums would be rounded, since the base lies in bfloat16 or q8_0.
        """
        if isinstance(self.base_layer, ANSWERING):
            raise ModelError(
                "this model was opened to answer, with its base in fewer bits, and merged weights would be rounded; "
                "merge with `phinetune merge`, or take the model that `phinetune.load` gives"
            )
        super().merge(*args, **kwargs)

    def projection(self, dtype: torch.dtype) -> Projection | None:
        """What the forward computes for a row of `dtype`, to be called outside of a graph; None if it can't be."""
        base: Any = self.base_layer
        return None if base.weight.dtype != dtype else adapted(self, nn.Linear, base.weight)


def only_adapter(layer: LoraLayer, base: type[nn.Module]) -> str | None:
    """The name of a layer's adapter, if `FusedLinear` computes it: the only active one, neither merged nor switched
    off, without a variant or a bias, on a base of exactly this class. Else None.
    """
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    if len(names) != 1 or layer.disable_adapters or layer.merged or type(layer.base_layer) is not base:
        return None
    name = names[0]
    return None if name in layer.lora_variant or layer.lora_bias[name] else str(name)


def base_alone(layer: LoraLayer, base: type[nn.Module]) -> bool:
    """Whether a layer's adapters are switched off and not merged, on a base of exactly this class."""
    return layer.disable_adapters and not layer.merged and type(layer.base_layer) is base


def projection(layer: nn.Module, dtype: torch.dtype) -> Projection | None:
    """What a linear layer computes for a row of `dtype`, to be called outside of a graph; None if it can't be."""
    if isinstance(layer, LoraLayer):
        found = getattr(layer, "projection", None)
        return found(dtype) if found else None
    if type(layer) is not nn.Linear or layer.weight.dtype != dtype or trained(layer):
        return None
    return Projection(layer.weight, layer.bias, layer.out_features)


def projections(layers: Sequence[nn.Module], dtype: torch.dtype) -> Projection | SideBySide | None:
    """What linear layers over the same rows of `dtype` compute, to be called outside of a graph; None if one can't be.

    Args:
        layers: one, or several whose outputs lie side by side.
    """
    found = tuple(one for one in (projection(layer, dtype) for layer in layers) if one is not None)
    if len(found) < len(layers):
        return None
    return found[0] if len(found) == 1 else SideBySide(found)


def adapted(layer: LoraLayer, base: type[nn.Module], weight: Tensor | BlockReader) -> Projection | None:
    """The projection of a fused layer on a base of exactly this class, whose weight is given."""
    inner: Any = layer.base_layer
    if trained(inner):
        return None
    if base_alone(layer, base):
        return Projection(weight, inner.bias, inner.out_features)
    name = only_adapter(layer, base)
    if name is None:
        return None
    dropout: Any = layer.lora_dropout[name]
    if dropout.training and not isinstance(dropout, nn.Identity):
        return None
    a, b, scaling = layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name]
    return Projection(weight, inner.bias, inner.out_features, a, b, scaling)  # type: ignore[arg-type]


def give_room(model: nn.Module) -> None:
    """Where a CPU multiplies half precision faster than float32, make base and adapter of each layer one product.

    Another pass over the output would cost much there (`phinetune.lora.one_product`). Layers that keep a weight of
    another kind, or one that trains, stay as they are.
    """
    fit = [layer for layer in _with_room(model) if _multiplies_fast(layer.base_layer.weight)]
    for layer in fit:
        one_product.make_room(layer.base_layer, max(layer.r.values()))
    if fit:
        trim_heap()  # of the weights as they lay before


def take_room(model: nn.Module) -> None:
    """Lay the weights out as any others."""
    held = [layer for layer in _with_room(model) if one_product.room_of(layer.base_layer.weight)]
    for layer in held:
        one_product.take_room(layer.base_layer)
    if held:
        trim_heap()


def _multiplies_fast(weight: Tensor) -> bool:
    return weight.device.type == "cpu" and weight.dtype in HALF_DTYPES and product_dtype(weight) is weight.dtype


def _with_room(model: nn.Module) -> Iterator[Any]:
    """The layers whose weight may have room."""
    for layer in model.modules():
        if type(layer) is FusedLinear and type(layer.base_layer) is nn.Linear and not trained(layer.base_layer):
            yield layer


def trained(layer: nn.Module) -> bool:
    """Whether a layer's own weight or bias is trained."""
    return any(parameter.requires_grad for parameter in layer.parameters(recurse=False))


def dropped(layer: LoraLayer, name: str, x: Tensor) -> Tensor | None:
    """The adapter's input after dropout; None if that is x itself."""
    dropout = layer.lora_dropout[name]
    return dropout(x) if dropout.training and not isinstance(dropout, nn.Identity) else None


def use_fused_layers(config: LoraConfig, model: Any) -> LoraConfig:
    """Make PEFT put fused layers onto the linear layers of `model`. What is saved stays as PEFT alone saves it.

    Layers with 8-bit weights keep PEFT's own class, because bitsandbytes has a product of its own for them.
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
