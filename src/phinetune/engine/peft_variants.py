"""PEFT's variants of LoRA, by the key of `peft.LoraConfig` that turns them on, and the ways in which an adapter begins.

LoRA itself adds s · B A to a weight, and the base stays as it was. A variant does more, so not every part of phinetune
takes it. The first table says which part takes which variant. It lists only keys that some part refuses. The second
table has every value of `init_lora_weights`, and says which of them a run can begin with.
"""

from __future__ import annotations

import difflib
import re
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
        moves: whether it changes the base itself, so that switching the adapter off does not give the base back.
    """

    fast: bool
    converted: bool
    merged: str | None
    moves: bool = False


VARIANTS: Mapping[str, Variant] = {
    "alora_invocation_tokens": Variant(
        fast=False,
        converted=False,
        merged="it acts only after certain tokens, and a merged weight would act on all",
    ),
    "arrow_config": Variant(fast=False, converted=False, merged="it chooses among adapters for each token"),
    "kasa_config": Variant(fast=True, converted=False, merged="KaSA is not merged", moves=True),
    "layer_replication": Variant(
        fast=False, converted=False, merged="layers that stand twice are not merged", moves=True
    ),
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


@dataclass(frozen=True)
class Start:
    """A value of `init_lora_weights`: what A and B are before the first step.

    Attributes:
        moves: whether it also changes the base's weights.
        quantized: whether it takes a base that is loaded quantised. The others compute with the weights themselves.
        refused: why a run can't begin with it; None if it can.
    """

    moves: bool = False
    quantized: bool = False
    refused: str | None = None


STARTS: Mapping[bool | str, Start] = {
    True: Start(quantized=True),
    False: Start(quantized=True),
    "gaussian": Start(quantized=True),
    "orthogonal": Start(),
    "mica": Start(),
    "pissa": Start(moves=True),
    "olora": Start(moves=True),
    "eva": Start(refused="it looks at activations over the data first, which a run does not do"),
    "corda": Start(moves=True, refused="it looks at covariances over the data first, which a run does not do"),
    "lora_ga": Start(moves=True, refused="it looks at gradients over the data first, which a run does not do"),
    "loftq": Start(
        moves=True,
        refused="it replaces the base's weights by rounded ones, which no adapter on the base itself can undo; for a "
        "quantised base set model.quantization: nf4",
    ),
}
# The keys that hold the settings of one start each. PEFT ignores them with any other start.
CONFIGS = {"eva_config": "eva", "corda_config": "corda", "lora_ga_config": "lora_ga", "loftq_config": "loftq"}
ITERATED_PISSA = re.compile(r"pissa_niter_\d+")  # N rounds of a fast decomposition
ITERATED = Start(moves=True)


def find_start(init_lora_weights: object) -> Start | None:
    """The start that this value of `init_lora_weights` names; None if there is no such start."""
    if isinstance(init_lora_weights, str) and ITERATED_PISSA.fullmatch(init_lora_weights):
        return ITERATED
    return STARTS.get(init_lora_weights) if isinstance(init_lora_weights, (bool, str)) else None


def refused_starts(peft: Mapping[str, Any], quantization: str) -> list[str]:
    """Why a run can't begin as its `peft_config` asks, one sentence for each problem.

    Args:
        peft: the keys of a `LoraConfig`.
        quantization: how the base is held.
    """
    name = peft.get("init_lora_weights", True)
    start = find_start(name)
    given = f"peft_config.init_lora_weights: `{name}`"
    problems = []
    if start is None:
        names = [*(str(one).lower() for one in STARTS), "pissa_niter_16"]
        near = difflib.get_close_matches(str(name).lower(), names, n=1)
        hint = f" did you mean `{near[0]}`?" if near else ""
        problems.append(f"{given} is none of {', '.join(names)} (or another number);{hint}".rstrip(";"))
    elif start.refused:
        problems.append(f"{given} can't be had: {start.refused}; or leave the key out")
    elif quantization != "none" and not start.quantized:
        problems.append(
            f"{given} computes with the base's own weights, and {quantization} rounds them; take true or gaussian, or "
            "a base that is not quantised"
        )
    return problems + [
        f"peft_config.{key} belongs to `init_lora_weights: {owner}`, which is not set; leave the key out"
        for key, owner in CONFIGS.items()
        if peft.get(key) and name != owner
    ]


def start_notes(peft: Mapping[str, Any]) -> list[str]:
    """What a user should know about the start, the biases and a later merge, a line each for the run's log."""
    notes = []
    if changes_the_base(peft.get("init_lora_weights", True)):
        notes.append(
            f"peft_config.init_lora_weights: {peft['init_lora_weights']} trains beside a changed base; saved is the "
            "same update as a plain LoRA adapter of twice the rank, for the base as it is"
        )
    if peft.get("bias", "none") != "none":
        notes.append(f"peft_config.bias: {peft['bias']} trains nothing more, since Phi-3 has no biases")
    later = [
        f"peft_config.{key} trains, but the adapter can't be merged later: {why}"
        for key, why in not_merged(peft).items()
    ]
    return notes + later


def moves_the_base(peft: Mapping[str, Any]) -> bool:
    """Whether a model with this adapter is not its base when the adapter is switched off."""
    moved = any(variant.moves and peft.get(key) for key, variant in VARIANTS.items())
    return moved or changes_the_base(peft.get("init_lora_weights", True))


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
    name = init_lora_weights.lower() if isinstance(init_lora_weights, str) else init_lora_weights
    start = find_start(name)
    return start.moves if start else str(name).startswith(("pissa", "corda"))  # so PEFT reads them


def why_not_the_whole_update(init_lora_weights: object) -> str | None:
    """The problem with an adapter that was saved after such an initialisation; None if there is none."""
    if not changes_the_base(init_lora_weights):
        return None
    return (
        f"`init_lora_weights` is {init_lora_weights!r}, which changed the base's weights, so A and B alone are not the "
        "whole update; save it with PEFT's `path_initial_model_for_weight_conversion` first"
    )


def why_not_begun_again(init_lora_weights: object) -> str | None:
    """Why PEFT can't change a base once more as it did before training; None if it can, or if the base stays.

    PiSSA and OLoRA of a weight are always the same. The others depend on data, on chance, or on what is not saved.
    """
    if not changes_the_base(init_lora_weights) or init_lora_weights in ("pissa", "olora"):
        return None
    return why_not_the_whole_update(init_lora_weights)
