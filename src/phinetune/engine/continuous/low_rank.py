"""Adapters as the answering engine holds them: A and B of each layer, beside a base that all share.

The tokens of a step lie side by side by their adapter. The base's product is computed once for all of them; then each
adapter adds s · (x Aᵀ) Bᵀ (LoRA, Hu et al. 2021, section 4.1) to its own tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from phinetune.engine.families import input_names
from phinetune.engine.kernels.low_rank import LowRank, add_low_rank_
from phinetune.engine.kernels.matmul import linear, takes_few
from phinetune.engine.lora_layers import only_adapter
from phinetune.errors import ModelError
from phinetune.lora.functional import lora_linear


@dataclass(frozen=True)
class Places:
    """Where a decoder layer has its linear layers: those that read the input of attention and MLP, and those behind."""

    attention: tuple[str, ...]
    mlp: tuple[str, ...]
    o: str = "self_attn.o_proj"
    down: str = "mlp.down_proj"

    @classmethod
    def of(cls, config: Any) -> Places:
        """In models of a configuration."""
        names = input_names(config)
        return cls(tuple(f"self_attn.{name}" for name in names.attention), tuple(f"mlp.{name}" for name in names.mlp))


# The updates of one adapter, by the layer's number and the place in it. What it leaves as it is has no entry.
Adapter = Mapping[tuple[int, str], LowRank]


@dataclass(frozen=True)
class Span:
    """Neighbouring tokens of a step that one adapter answers; None is the base alone."""

    adapter: Adapter | None
    start: int
    stop: int


def product(x: Tensor, layer: Any, number: int, places: Sequence[str], spans: Sequence[Span]) -> Tensor:
    """The outputs of linear layers of a decoder layer side by side, with the adapters of their tokens.

    Args:
        x: shape (tokens, in).
        number: the decoder layer's.
        places: of the linear layers in it.
        spans: they cover the tokens in order.
    """
    made = [_product(x, layer.get_submodule(place), (number, place), spans) for place in places]
    return made[0] if len(made) == 1 else torch.cat(made, dim=-1)


def _product(x: Tensor, module: Any, where: tuple[int, str], spans: Sequence[Span]) -> Tensor:
    if type(module) is not nn.Linear:  # quantised: its class knows its product
        return _add(module(x), x, where, spans)
    only = spans[0].adapter.get(where) if len(spans) == 1 and spans[0].adapter else None
    if only and not takes_few(x, module.weight):
        return lora_linear(x, module.weight, module.bias, only.a, only.b_t.t(), only.scaling)
    return _add(linear(x, module.weight, module.bias), x, where, spans)


def _add(out: Tensor, x: Tensor, where: tuple[int, str], spans: Sequence[Span]) -> Tensor:
    found = ((span.adapter.get(where), span) for span in spans if span.adapter)
    add_low_rank_(out, x, [(one, span.start, span.stop) for one, span in found if one])
    return out


def kept_spans(spans: Sequence[Span], kept: Sequence[int]) -> list[Span]:
    """The spans after only some tokens are kept, in their order."""
    made, start = [], 0
    for span in spans:
        count = sum(span.start <= token < span.stop for token in kept)
        if count:
            made.append(Span(span.adapter, start, start + count))
        start += count
    return made


def read_updates(model: Any, weights: Mapping[str, Tensor] | None = None) -> Adapter:
    """The updates of a PEFT model's adapter.

    Args:
        weights: A and B by their names in an adapter's file, for a model without memory. None: the model's own.

    Raises:
        ModelError: the adapter does more than add A and B to a decoder's linear layers.
    """
    from peft.tuners.lora.layer import LoraLayer
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    found: dict[tuple[int, str], LowRank] = {}
    others = {
        name for name, module in model.named_modules() if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))
    }
    names = {module: name for name, module in model.named_modules()}
    base = model.get_base_model()
    places = Places.of(base.config)
    for number, layer in enumerate(base.model.layers):
        for place in (*places.attention, places.o, *places.mlp, places.down):
            module = layer.get_submodule(place)
            name = only_adapter(module, type(module.base_layer)) if isinstance(module, LoraLayer) else None
            if name is not None:
                a, b = (
                    weights[f"{names[module]}.{side}.weight"]
                    if weights
                    else getattr(module, side)[name].weight.detach()
                    for side in ("lora_A", "lora_B")
                )
                found[number, place] = LowRank(a, b.t().contiguous(), module.scaling[name])
                others.discard(names[module])
    if others:
        first = sorted(others)[0]
        raise ModelError(
            f"the adapter is more than LoRA on the decoder's linear layers ({first} and {len(others) - 1} more), which "
            "can't be answered beside others on one base; merge it (`phinetune merge`) and serve what comes out"
        )
    return found


def on_device(adapter: Adapter, dtype: torch.dtype, device: torch.device) -> Adapter:
    """The updates in the base's dtype, on its device."""
    return {
        where: LowRank(
            update.a.to(device, dtype).contiguous(), update.b_t.to(device, dtype).contiguous(), update.scaling
        )
        for where, update in adapter.items()
    }
