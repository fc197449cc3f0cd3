"""From a PEFT adapter of fused layers (`qkv_proj`, `gate_up_proj`) to one of split layers (`q_proj`, …), and back.

Fused to split keeps the rank: every split gets the whole A and its own rows of B. Split to fused stacks the different
matrices A:

    A = [A_q; A_k; A_v]        B = diag(B_q, B_k, B_v)        rank r_q + r_k + r_v

If the splits have the same A, it is stacked only once. So an adapter that was split gets its old rank back.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from peft import LoraConfig
from torch import Tensor

from phinetune.checkpoints import random_shapes
from phinetune.checkpoints.adapters import read_base
from phinetune.checkpoints.load import find_folder, read_config
from phinetune.checkpoints.target_modules import FUSED, PARTS
from phinetune.engine.families import ModelConfig
from phinetune.errors import ModelError, PhinetuneError, at_most
from phinetune.exporting.convert.layers import Adapter, ConvertedLayer, Splits, last_part, splits_of, unmatched


def to_split(adapters: Mapping[str, Adapter], fused: Mapping[str, Splits]) -> dict[str, ConvertedLayer]:
    """The layers with every fused layer split. All get the same scale, because vLLM reads one for the whole adapter.

    If a column of B is zero in all rows of a split, the split leaves it out. So an adapter that was stacked comes apart
    into what it was.

    Args:
        adapters: the adapters by layer name.
        fused: the splits of fused layers, by the end of the layers' names.

    Raises:
        ModelError: layers can't be split; the error lists all of them.
    """
    problems = unmatched("--merged", fused, list(adapters))
    to_cut = [name for name in adapters if last_part(name) in PARTS]
    if not to_cut:
        problems.append(f"there is no fused layer ({', '.join(PARTS)}) with an adapter")
    for name in to_cut:
        problems += _wrong_fused(name, adapters, splits_of(name, fused))
    if problems:
        raise ModelError(at_most(problems))
    scale = Counter(adapter.scale for adapter in adapters.values()).most_common(1)[0][0]
    layers: dict[str, ConvertedLayer] = {}
    for name, adapter in adapters.items():
        splits = splits_of(name, fused) if name in to_cut else None
        if splits is None:
            layers[name] = ConvertedLayer(adapter.with_scale(scale), ((0, adapter),), last_part(name))
            continue
        for part, piece in _cut(name, adapter, splits):
            layers[part] = ConvertedLayer(_trimmed(piece).with_scale(scale), ((0, piece),), last_part(part))
    return layers


def _sibling(name: str, last: str) -> str:
    """The full name of the layer `last` that is in the same module as `name`."""
    path, dot, _ = name.rpartition(".")
    return f"{path}{dot}{last}"


def _wrong_fused(name: str, adapters: Mapping[str, Adapter], splits: Splits | None) -> list[str]:
    parts, adapter = PARTS[last_part(name)], adapters[name]
    problems = [
        f"{name}: has an adapter, and {part} has one, too" for part in parts if _sibling(name, part) in adapters
    ]
    if splits is None:
        example = f"{last_part(name)}={','.join(part[0].upper() for part in parts)}"
        problems.append(
            f"{name}: it is not known how its {adapter.out} rows are split; give it with --merged {example}"
        )
    elif len(splits.rows) != len(parts):
        problems.append(f"{name}: {len(splits.rows)} splits are given; the layer has {', '.join(parts)}")
    elif splits.out != adapter.out:
        problems.append(f"{name}: the splits add up to {splits.out} rows; the layer has {adapter.out}")
    else:
        rows = zip(parts, splits.adapted, adapter.b.split(splits.rows), strict=True)
        problems += [
            f"{name}: --merged says that {part} has no adapter, but its rows of lora_B are not zero"
            for part, adapted, b in rows
            if not adapted and b.any()
        ]
    return problems


def _cut(name: str, adapter: Adapter, splits: Splits) -> list[tuple[str, Adapter]]:
    """(name, adapter) of each split. A split whose rows of B are all zero has no adapter, unless all of B is zero."""
    pieces = [
        (_sibling(name, part), replace(adapter, b=b))
        for part, b, adapted in zip(PARTS[last_part(name)], adapter.b.split(splits.rows), splits.adapted, strict=True)
        if adapted
    ]
    return [(part, piece) for part, piece in pieces if piece.b.any()] or pieces


def _trimmed(adapter: Adapter) -> Adapter:
    """The adapter without the zero columns of B and their rows of A. If all of B is zero, nothing is left out."""
    kept = adapter.b.any(dim=0)
    if kept.all() or not kept.any():
        return adapter
    return replace(adapter, a=adapter.a[kept], b=adapter.b[:, kept])


def to_fused(adapters: Mapping[str, Adapter], fused: Mapping[str, Splits]) -> dict[str, ConvertedLayer]:
    """The layers with the split layers joined. Each fused layer has the scale of its first split.

    Args:
        adapters: the adapters by layer name.
        fused: the splits of fused layers, by the end of the layers' names. They are needed for splits without an
            adapter whose rows do not follow from the others.

    Raises:
        ModelError: layers can't be joined; the error lists all of them.
    """
    groups: dict[str, dict[str, Adapter]] = {}
    for name, adapter in adapters.items():
        if last_part(name) in FUSED:
            groups.setdefault(_sibling(name, FUSED[last_part(name)]), {})[last_part(name)] = adapter
    problems = unmatched("--merged", fused, list(groups))
    if not groups:
        problems.append(f"there is no split layer ({', '.join(FUSED)}) with an adapter")
    rows = {name: _rows(name, parts, splits_of(name, fused)) for name, parts in groups.items()}
    for name, parts in groups.items():
        problems += _wrong_parts(name, parts, rows[name], name in adapters, splits_of(name, fused))
    if problems:
        raise ModelError(at_most(problems))
    layers: dict[str, ConvertedLayer] = {}
    for name, adapter in adapters.items():
        fused_name = _sibling(name, FUSED.get(last_part(name), last_part(name)))
        if fused_name not in groups:
            layers[name] = ConvertedLayer(adapter, ((0, adapter),), last_part(name))
        elif fused_name not in layers:
            order = [groups[fused_name].get(part) for part in PARTS[last_part(fused_name)]]
            layers[fused_name] = _joined(order, [count or 0 for count in rows[fused_name]], last_part(fused_name))
    return layers


def _rows(name: str, parts: Mapping[str, Adapter], splits: Splits | None) -> list[int | None]:
    """The rows of each split; None if they are not known.

    They are those of its own adapter, else the rows that are given, else those of its twin: k and v have as many rows,
    and so have gate and up.
    """
    order = PARTS[last_part(name)]
    given = splits.rows if splits and len(splits.rows) == len(order) else (None,) * len(order)
    rows = [parts[part].out if part in parts else count for part, count in zip(order, given, strict=True)]
    *others, left, right = rows
    return [*others, right if left is None else left, left if right is None else right]


def _wrong_parts(
    name: str, parts: Mapping[str, Adapter], rows: Sequence[int | None], is_adapted: bool, splits: Splits | None
) -> list[str]:
    order = PARTS[last_part(name)]
    problems = [f"{name}: has an adapter, and {', '.join(parts)} have adapters, too"] if is_adapted else []
    unknown = [part for part, count in zip(order, rows, strict=True) if count is None]
    if unknown:
        example = f"{last_part(name)}={','.join(part[0].upper() for part in order)}"
        problems.append(f"{name}: it is not known how many rows {unknown[0]} has; give it with --merged {example}")
    if splits and len(splits.rows) != len(order):
        problems.append(f"{name}: {len(splits.rows)} splits are given; the layer has {', '.join(order)}")
    elif splits:
        problems += [
            f"{name}: {count} rows are given for {part}; its adapter has {parts[part].out}"
            for part, count in zip(order, splits.rows, strict=True)
            if part in parts and parts[part].out != count
        ]
    if len({part.a.shape[1] for part in parts.values()}) > 1:
        problems.append(
            f"{name}: {', '.join(parts)} take inputs of different widths, so they are not splits of one layer"
        )
    return problems


def _joined(parts: Sequence[Adapter | None], rows: Sequence[int], kind: str) -> ConvertedLayer:
    """The layer with one adapter over all rows, made from those of its splits. None is a split without an adapter."""
    adapted = [part for part in parts if part]
    scale = adapted[0].scale
    stacked = _distinct([part.a for part in adapted])
    blocks = [part.with_scale(scale).b if part else None for part in parts]
    dtype = max((block.dtype for block in blocks if block is not None), key=lambda one: one.itemsize)
    b = torch.zeros(sum(rows), sum(len(a) for a in stacked), dtype=dtype)
    sources = []
    first = 0
    for part, block, count in zip(parts, blocks, rows, strict=True):
        if part is not None and block is not None:
            place = next(i for i, a in enumerate(stacked) if torch.equal(part.a, a))
            column = sum(len(a) for a in stacked[:place])
            b[first : first + count, column : column + part.rank] = block
            sources.append((first, part))
        first += count
    return ConvertedLayer(Adapter(torch.cat(stacked), b, scale), tuple(sources), kind)


def _distinct(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors, equal ones only once."""
    found: list[Tensor] = []
    for tensor in tensors:
        if not any(torch.equal(tensor, other) for other in found):
            found.append(tensor)
    return found


def known_splits(config: ModelConfig) -> dict[str, Splits]:
    """The splits of a Phi-3's fused layers."""
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    q, kv = config.num_attention_heads * head, (config.num_key_value_heads or config.num_attention_heads) * head
    rows = {"qkv_proj": (q, kv, kv), "gate_up_proj": (config.intermediate_size,) * 2}
    return {name: Splits(sizes, (True,) * len(sizes)) for name, sizes in rows.items()}


def base_config(folder: Path, adapter: LoraConfig) -> ModelConfig | None:
    """The configuration of the base that is recorded with an adapter; None if it is not available."""
    record = read_base(folder)
    path = record.path if record else adapter.base_model_name_or_path
    if not path:
        return None
    try:
        if path.startswith(random_shapes.PREFIX):
            return random_shapes.parse_shape(path)
        if Path(path).expanduser().is_dir() or path == "starter":
            return read_config(find_folder(path, None)[0])
        from huggingface_hub import hf_hub_download

        return read_config(Path(hf_hub_download(path, "config.json", revision=adapter.revision)).parent)
    except (PhinetuneError, OSError, ValueError):  # no network, no such repository, another kind of model
        return None


def target_names(layers: Mapping[str, ConvertedLayer], count: int | None) -> list[str]:
    """The names for `target_modules`: last parts, such as `q_proj`, if they mean exactly these layers; else full names.

    Args:
        count: the number of decoder layers of the model; None if it is not known.
    """
    places: dict[str, set[str]] = {}
    for name in layers:
        match = re.search(r"\.layers\.(\d+)\.", name)
        places.setdefault(last_part(name), set()).add(match[1] if match else "")
    in_all_layers = {str(i) for i in range(count)} if count else None
    short = all(found in (in_all_layers, {""}) for found in places.values())
    return list(places) if short else list(layers)
