"""PEFT's variants of LoRA, by the key of `peft.LoraConfig` that turns them on.

LoRA itself adds s · B A to a weight, and the base stays as it was. A variant does more, so not every part of phinetune
takes it. This table says which part takes which variant. It lists only keys that some part refuses.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Variant:
    """What works with one variant.

    Attributes:
        fast: whether the fast engine trains it. False if it reads more than a layer's input, or if it replaces more
            than linear layers.
        converted: whether `phinetune convert` takes it. False if A and B are not the whole update, or if something
            else is trained beside them.
        merged: why `phinetune merge` refuses it; None if it can be merged. A merge makes fixed weights of a Phi-3: no
            weight can depend on the input, and there is no place for a parameter that Phi-3 does not have.
    """

    fast: bool
    converted: bool
    merged: str | None


VARIANTS: Mapping[str, Variant] = {
    "alora_invocation_tokens": Variant(
        fast=False,
        converted=False,
        merged="it acts only after certain tokens, and a merged weight would act on all",
    ),
    "arrow_config": Variant(fast=False, converted=False, merged="it chooses among adapters for each token"),
    "kasa_config": Variant(fast=True, converted=False, merged="KaSA is not merged"),
    "layer_replication": Variant(fast=False, converted=False, merged="layers that stand twice are not merged"),
    "lora_bias": Variant(
        fast=True, converted=False, merged="Phi-3's layers have no bias that could take the adapter's"
    ),
    "megatron_config": Variant(fast=True, converted=False, merged="Megatron's layers are not merged"),
    "modules_to_save": Variant(fast=True, converted=False, merged=None),
    "monteclora_config": Variant(fast=False, converted=False, merged="MonteCLoRA is not merged"),
    "target_parameters": Variant(fast=False, converted=False, merged="adapters on bare parameters are not merged"),
    "trainable_token_indices": Variant(fast=False, converted=False, merged="single trained tokens are not merged"),
    "use_bdlora": Variant(fast=False, converted=False, merged="BD-LoRA is not merged"),
    "use_dora": Variant(fast=True, converted=False, merged=None),
    "use_qalora": Variant(fast=True, converted=False, merged="QA-LoRA is not merged"),
    "velora_config": Variant(fast=False, converted=False, merged="VeLoRA is not merged"),
}

# Values of `init_lora_weights` that change the base's weights too, or their beginning (`pissa_niter_16`).
CHANGE_THE_BASE = ("pissa", "corda", "olora", "mica", "loftq", "lora_ga")


def not_fast(peft: Mapping[str, Any]) -> list[str]:
    """The keys of a `LoraConfig` that are set and that the fast engine does not take."""
    return [key for key, variant in VARIANTS.items() if not variant.fast and peft.get(key)]


def not_merged(peft: Mapping[str, Any]) -> dict[str, str]:
    """The keys of a `LoraConfig` that are set and that can't be merged, each with the reason."""
    return {key: variant.merged for key, variant in VARIANTS.items() if variant.merged and peft.get(key)}


def not_converted(peft: Mapping[str, Any]) -> list[str]:
    """The keys of a `LoraConfig` that are set and that can't be converted."""
    return [key for key, variant in VARIANTS.items() if not variant.converted and peft.get(key)]


def changes_the_base(init_lora_weights: object) -> bool:
    """Whether this value of `init_lora_weights` changes the base's weights, not only A and B."""
    return isinstance(init_lora_weights, str) and init_lora_weights.lower().startswith(CHANGE_THE_BASE)


def why_not_the_whole_update(init_lora_weights: object) -> str | None:
    """The problem with an adapter that was saved after such an initialisation; None if there is none."""
    if not changes_the_base(init_lora_weights):
        return None
    return (
        f"`init_lora_weights` is {init_lora_weights!r}, which changed the base's weights, so A and B alone are not the "
        "whole update; save it with PEFT's `path_initial_model_for_weight_conversion` first"
    )
