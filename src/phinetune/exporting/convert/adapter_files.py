"""Reading and writing the two forms of a LoRA adapter on disk: PEFT's folder and loralib's checkpoint.

Both hold A (r, in) and B (out, r) of each layer. PEFT's folder also tells the scale, in `adapter_config.json`.
loralib's file does not; there the scale is in the model's code. loralib's `MergedLinear` holds the stacked adapters of
the splits of a fused layer.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from peft import LoraConfig
from peft.utils.other import get_pattern_key
from safetensors.torch import save_file
from torch import Tensor

from phinetune.checkpoints.adapter_fit import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from phinetune.checkpoints.adapters import read_adapter_config
from phinetune.checkpoints.foreign_adapters import peft_folder
from phinetune.checkpoints.patterns import why_no_end
from phinetune.checkpoints.weight_files import read_tensors
from phinetune.engine.peft_variants import not_converted, why_not_the_whole_update
from phinetune.errors import ModelError, at_most
from phinetune.exporting.convert.layers import Adapter, last_part
from phinetune.exporting.convert.torch_files import read_state
from phinetune.files import write_text

PEFT_NAME = re.compile(
    r"base_model\.model\.(?P<layer>.+)\.lora_(?:(?P<embedding>embedding_)?(?P<part>[AB])(?P<end>.*))"
)
LORALIB_NAME = re.compile(r"(?P<layer>.+)\.lora_(?P<part>[AB])")

Value = TypeVar("Value")


def read_peft(folder: Path) -> tuple[LoraConfig, dict[str, Adapter]]:
    """Read a PEFT adapter folder: its configuration, and the adapters by the layer's name in the base.

    Raises:
        ModelError: the adapter is missing or damaged, or holds more than LoRA's A and B of linear layers and
            embeddings. The error lists all that it holds beyond these.
    """
    folder = peft_folder(folder)
    config = read_adapter_config(folder)
    tensors = read_tensors(folder / ADAPTER_WEIGHTS)
    problems = [f"{folder / ADAPTER_CONFIG}: {what}" for what in _more_than_a_and_b(config)]
    parts: dict[str, dict[str, Tensor]] = {}
    embeddings: set[str] = set()
    for name, tensor in tensors.items():
        match = PEFT_NAME.fullmatch(name)
        if not match or match["end"] != ("" if match["embedding"] else ".weight"):
            problems.append(f"{folder / ADAPTER_WEIGHTS}: {name} is not a LoRA tensor{_why_there(name)}")
            continue
        parts.setdefault(match["layer"], {})[match["part"]] = tensor
        if match["embedding"]:
            embeddings.add(match["layer"])
    problems += _wrong_pairs(parts)
    problems += [f"{folder / ADAPTER_CONFIG}: {what}" for what in why_no_end(vars(config), parts)]
    if not problems:
        problems += _wrong_ranks(config, parts)
    if problems:
        raise ModelError(at_most(problems))
    return config, {
        name: Adapter(pair["A"], pair["B"], _peft_scale(config, name, pair["A"].shape[0]), name in embeddings)
        for name, pair in parts.items()
    }


def _more_than_a_and_b(config: LoraConfig) -> list[str]:
    """The problems of a configuration with which A and B are not the whole adapter."""
    problems = [
        f"`{key}` is set, which A and B alone do not hold; it is not converted" for key in not_converted(vars(config))
    ]
    if config.bias != "none":
        problems.append(f"`bias` is {config.bias!r}: trained biases are not converted, only LoRA's A and B")
    not_whole = why_not_the_whole_update(config.init_lora_weights)
    if not_whole:
        problems.append(not_whole)
    if not config.lora_alpha > 0:
        problems.append(f"`lora_alpha` is {config.lora_alpha}; it must be above 0")
    return problems


def _why_there(name: str) -> str:
    """The rest of the sentence on a tensor that is not LoRA's, if its origin is known."""
    if name.endswith(".base_layer.weight"):
        return " but a copy of the base's weights (`save_pretrained(…, save_embedding_layers=False)` leaves it out)"
    return ""


def _wrong_ranks(config: LoraConfig, parts: Mapping[str, Mapping[str, Tensor]]) -> list[str]:
    ranks = {name: _pattern_value(config.rank_pattern or {}, name, config.r) for name in parts}
    return [
        f"{name}: the configuration says rank {ranks[name]}, but lora_A has {pair['A'].shape[0]} rows"
        for name, pair in parts.items()
        if pair["A"].shape[0] != ranks[name] or pair["B"].shape[1] != ranks[name]
    ]


def _wrong_pairs(parts: Mapping[str, Mapping[str, Tensor]]) -> list[str]:
    """A problem for each layer whose tensors are not one matrix A and one matrix B."""
    problems = [] if parts else ["the adapter holds no LoRA tensor"]
    for name, pair in parts.items():
        missing = [part for part in "AB" if part not in pair]
        shapes = [tuple(tensor.shape) for tensor in pair.values()]
        if missing:
            problems.append(f"{name}: lora_{missing[0]} is missing")
        elif any(len(shape) > 2 for shape in shapes):
            problems.append(f"{name}: a convolution's adapter (lora_A {shapes[0]}), which is not converted")
        elif any(len(shape) != 2 or 0 in shape for shape in shapes):
            problems.append(f"{name}: lora_A and lora_B must be matrices; their shapes are {shapes[0]} and {shapes[1]}")
        elif not all(torch.isfinite(tensor).all() for tensor in pair.values()):
            problems.append(f"{name}: its adapter holds values that are not finite")
    return problems


def _pattern_value(patterns: Mapping[str, Value], name: str, default: Value) -> Value:
    return patterns.get(get_pattern_key(list(patterns), name), default)


def _peft_scale(config: LoraConfig, name: str, rank: int) -> float:
    alpha = _pattern_value(config.alpha_pattern or {}, name, config.lora_alpha)
    return float(alpha / (math.sqrt(rank) if config.use_rslora else rank))


def write_peft(
    adapters: Mapping[str, Adapter],
    folder: Path,
    base: str | None,
    like: LoraConfig | None = None,
    targets: Sequence[str] | None = None,
    largest: bool = False,
) -> None:
    """Write `adapters` as PEFT does, into a folder that exists. No adapter may have splits.

    Ranks and alphas that differ from the most common ones go to `rank_pattern` and `alpha_pattern`.

    Args:
        base: the base's name or path for the record.
        like: the configuration that the task and the base's revision are taken from.
        targets: the names for `target_modules`; the default is every layer's full name.
        largest: make the largest rank `r` instead of the most common, for servers that reserve memory for `r`.
    """
    kinds = {name: (one.rank, _tidy(one.scale * one.rank)) for name, one in adapters.items()}
    rank, alpha = max(kinds.values()) if largest else Counter(kinds.values()).most_common(1)[0][0]
    names = list(targets or adapters)
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type, unused-ignore]
        rank_pattern=_patterns({name: kind[0] for name, kind in kinds.items()}, rank),
        alpha_pattern=_patterns({name: kind[1] for name, kind in kinds.items()}, alpha),
        target_modules=names,
        base_model_name_or_path=base,
        task_type=like.task_type if like else None,
        revision=like.revision if like else None,
        inference_mode=True,
    )
    config.save_pretrained(str(folder))
    # PEFT writes the target modules in random order, because it holds them in a set.
    tree = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    tree["target_modules"] = names
    write_text(folder / ADAPTER_CONFIG, json.dumps(tree, indent=2, sort_keys=True) + "\n")
    tensors = {}
    for name, one in adapters.items():
        for part, tensor in (("A", one.a), ("B", one.b)):
            last = f"lora_embedding_{part}" if one.embedding else f"lora_{part}.weight"
            tensors[f"base_model.model.{name}.{last}"] = tensor.clone().contiguous()
    save_file(tensors, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    # safetensors writes files that only the owner can read.
    shutil.copymode(folder / ADAPTER_CONFIG, folder / ADAPTER_WEIGHTS)


def _tidy(alpha: float) -> float:
    """`alpha` without the rounding error of a division; an int if it is a whole number."""
    rounded = float(f"{alpha:.12g}")
    return int(rounded) if rounded.is_integer() else rounded


def _patterns(values: Mapping[str, Value], default: Value) -> dict[str, Value]:
    """PEFT's patterns for the values that differ from `default`.

    A pattern is the last part of the layers' names if all of them have the same value, else the full name of a layer.
    """
    by_last: dict[str, dict[str, Value]] = {}
    for name, value in values.items():
        by_last.setdefault(last_part(name), {})[name] = value
    patterns: dict[str, Value] = {}
    for last, layers in by_last.items():
        found = set(layers.values())
        if len(found) == 1:
            patterns[re.escape(last)] = found.pop()
        else:
            patterns.update({f"^{re.escape(name)}": value for name, value in layers.items()})
    return {pattern: value for pattern, value in patterns.items() if value != default}


def read_loralib(file: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Read lora_A and lora_B by layer name, from a file with the result of `lora.lora_state_dict`.

    Raises:
        ModelError: the file is missing or damaged, or something in it is clearly not lora_A or lora_B of a linear layer
            or an embedding.
    """
    state = read_state(file)
    parts: dict[str, dict[str, Tensor]] = {}
    problems = []
    for name, tensor in state.items():
        match = LORALIB_NAME.fullmatch(name)
        if match:
            parts.setdefault(match["layer"], {})[match["part"]] = tensor.detach()
        elif name.removesuffix(".weight").removesuffix(".bias").endswith(".conv"):
            problems.append(f"{file}: {name} belongs to a convolution, and loralib's convolutions have no form in PEFT")
        else:
            problems.append(f"{file}: {name} is neither a lora_A nor a lora_B of a layer; only those are converted")
    problems += _wrong_pairs(parts)
    if problems:
        raise ModelError(at_most(problems))
    return {name: (pair["A"], pair["B"]) for name, pair in parts.items()}


def write_loralib(adapters: Mapping[str, Adapter], file: Path) -> None:
    """Write `adapters` as `torch.save(lora.lora_state_dict(model), file)` does."""
    state = {}
    for name, one in adapters.items():
        state[f"{name}.lora_A"] = one.a.clone().contiguous()
        state[f"{name}.lora_B"] = one.b.clone().contiguous()
    torch.save(state, file)
