"""A PEFT adapter's fused layers (`qkv_proj`, `gate_up_proj`) as split ones (`q_proj`, …) and back.

Fused to split keeps the rank: the splits share A, and B's rows are cut. Split to fused stacks the A's that differ:

    A = [A_q; A_k; A_v]        B = diag(B_q, B_k, B_v)        rank r_q + r_k + r_v

so splits that share one A come back to its own rank.
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
from transformers import Phi3Config

from phinetune.checkpoints import random_shapes as synthetic
from phinetune.checkpoints.adapters import FUSED, read_base
from phinetune.checkpoints.load import find_folder, read_config
from phinetune.errors import ModelError, PhinetuneError, at_most
from phinetune.export.convert.layers import Adapter, Layer, Splits, splits_of, unmatched

PARTS = {whole: tuple(part for part, name in FUSED.items() if name == whole) for whole in dict.fromkeys(FUSED.values())}


def to_split(adapters: Mapping[str, Adapter], fused: Mapping[str, Splits]) -> dict[str, Layer]:
    """The layers with every fused one in its splits, all with one scale (vLLM reads one for the whole adapter).

    A column of B that is zero in a split's rows is left out there: what was stacked comes apart as it was.

    Args:
        adapters: by the layer's name.
        fused: the splits of fused layers by the end of their names.

    Raises:
        ModelError: all layers that can't be split.
    """
    problems = unmatched("--merged", fused, list(adapters))
    wholes = [name for name in adapters if _last(name) in PARTS]
    if not wholes:
        problems.append(f"there is no fused layer ({', '.join(PARTS)}) with an adapter")
    for name in wholes:
        problems += _wrong_whole(name, adapters, splits_of(name, fused))
    if problems:
        raise ModelError(at_most(problems))
    scale = Counter(adapter.scale for adapter in adapters.values()).most_common(1)[0][0]
    layers: dict[str, Layer] = {}
    for name, adapter in adapters.items():
        splits = splits_of(name, fused) if name in wholes else None
        if splits is None:
            layers[name] = Layer(adapter.with_scale(scale), ((0, adapter),), _last(name))
            continue
        for part, piece in _cut(name, adapter, splits):
            layers[part] = Layer(_trimmed(piece).with_scale(scale), ((0, piece),), _last(part))
    return layers


def _last(name: str) -> str:
    return name.rsplit(".", 1)[-1]


def _sibling(name: str, last: str) -> str:
    """The name of a layer beside `name`."""
    path, dot, _ = name.rpartition(".")
    return f"{path}{dot}{last}"


def _wrong_whole(name: str, adapters: Mapping[str, Adapter], splits: Splits | None) -> list[str]:
    parts, adapter = PARTS[_last(name)], adapters[name]
    problems = [f"{name}: has an adapter itself and {p} has one, too" for p in parts if _sibling(name, p) in adapters]
    if splits is None:
        example = f"{_last(name)}={','.join(part[0].upper() for part in parts)}"
        problems.append(f"{name}: how its {adapter.out} rows are split is not known; say it with --merged {example}")
    elif len(splits.rows) != len(parts):
        problems.append(f"{name}: {len(splits.rows)} splits are given; it stands for {', '.join(parts)}")
    elif splits.out != adapter.out:
        problems.append(f"{name}: the splits add up to {splits.out} rows; the layer has {adapter.out}")
    else:
        rows = zip(parts, splits.on, adapter.b.split(splits.rows), strict=True)
        problems += [
            f"{name}: --merged says that {part} has no adapter, and lora_B's rows there are not zero"
            for part, on, b in rows
            if not on and b.any()
        ]
    return problems


def _cut(name: str, adapter: Adapter, splits: Splits) -> list[tuple[str, Adapter]]:
    """(name, adapter) of each split; of one whose rows are all zero beside others that are not, there is none."""
    pieces = [
        (_sibling(name, part), replace(adapter, b=b))
        for part, b, on in zip(PARTS[_last(name)], adapter.b.split(splits.rows), splits.on, strict=True)
        if on
    ]
    return [piece for piece in pieces if piece[1].b.any()] or pieces


def _trimmed(adapter: Adapter) -> Adapter:
    """Without the columns of B that are zero, and their rows of A; a B of zeros is left as it is."""
    kept = adapter.b.any(dim=0)
    if kept.all() or not kept.any():
        return adapter
    return replace(adapter, a=adapter.a[kept], b=adapter.b[:, kept])


def to_fused(adapters: Mapping[str, Adapter], fused: Mapping[str, Splits]) -> dict[str, Layer]:
    """The layers with the split ones joined; each fused layer has the scale of its first split.

    Args:
        adapters: by the layer's name.
        fused: the splits of fused layers by the end of their names, for those that can't be told by the others.

    Raises:
        ModelError: all layers that can't be joined.
    """
    groups: dict[str, dict[str, Adapter]] = {}
    for name, adapter in adapters.items():
        if _last(name) in FUSED:
            groups.setdefault(_sibling(name, FUSED[_last(name)]), {})[_last(name)] = adapter
    problems = unmatched("--merged", fused, list(groups))
    if not groups:
        problems.append(f"there is no split layer ({', '.join(FUSED)}) with an adapter")
    rows = {name: _rows(name, parts, splits_of(name, fused)) for name, parts in groups.items()}
    for name, parts in groups.items():
        problems += _wrong_parts(name, parts, rows[name], name in adapters, splits_of(name, fused))
    if problems:
        raise ModelError(at_most(problems))
    layers: dict[str, Layer] = {}
    for name, adapter in adapters.items():
        whole = _sibling(name, FUSED.get(_last(name), _last(name)))
        if whole not in groups:
            layers[name] = Layer(adapter, ((0, adapter),), _last(name))
        elif whole not in layers:
            order = [groups[whole].get(part) for part in PARTS[_last(whole)]]
            layers[whole] = _joined(order, [count or 0 for count in rows[whole]], _last(whole))
    return layers


def _rows(name: str, parts: Mapping[str, Adapter], splits: Splits | None) -> list[int | None]:
    """Rows of each split: its own adapter's, else what is given, else those of its like (k and v, gate and up)."""
    order = PARTS[_last(name)]
    given = splits.rows if splits and len(splits.rows) == len(order) else (None,) * len(order)
    rows = [parts[part].out if part in parts else count for part, count in zip(order, given, strict=True)]
    like = rows[-1] if rows[-1] is not None else rows[-2]
    return [*rows[:-2], rows[-2] if rows[-2] is not None else like, like]


def _wrong_parts(
    name: str, parts: Mapping[str, Adapter], rows: Sequence[int | None], whole: bool, splits: Splits | None
) -> list[str]:
    order = PARTS[_last(name)]
    problems = [f"{name}: has an adapter itself, and {', '.join(parts)} have"] if whole else []
    unknown = [part for part, count in zip(order, rows, strict=True) if count is None]
    if unknown:
        example = f"{_last(name)}={','.join(part[0].upper() for part in order)}"
        problems.append(f"{name}: how many rows {unknown[0]} has is not known; say it with --merged {example}")
    if splits and len(splits.rows) != len(order):
        problems.append(f"{name}: {len(splits.rows)} splits are given; it stands for {', '.join(order)}")
    elif splits:
        problems += [
            f"{name}: {count} rows are given for {part}; its adapter has {parts[part].out}"
            for part, count in zip(order, splits.rows, strict=True)
            if part in parts and parts[part].out != count
        ]
    if len({part.a.shape[1] for part in parts.values()}) > 1:
        problems.append(f"{name}: {', '.join(parts)} take inputs of unlike widths, so they are not one layer's splits")
    return problems


def _joined(parts: Sequence[Adapter | None], rows: Sequence[int], kind: str) -> Layer:
    """One adapter over all rows; None is a split without one."""
    there = [part for part in parts if part]
    scale = there[0].scale
    distinct: list[Tensor] = []
    for one in there:
        if not any(torch.equal(one.a, a) for a in distinct):
            distinct.append(one.a)
    blocks = [part.with_scale(scale).b if part else None for part in parts]
    dtype = max((block.dtype for block in blocks if block is not None), key=lambda one: one.itemsize)
    b = torch.zeros(sum(rows), sum(len(a) for a in distinct), dtype=dtype)
    sources = []
    first = 0
    for part, block, count in zip(parts, blocks, rows, strict=True):
        if part is not None and block is not None:
            i = next(i for i, a in enumerate(distinct) if torch.equal(part.a, a))
            column = sum(len(a) for a in distinct[:i])
            b[first : first + count, column : column + part.rank] = block
            sources.append((first, part))
        first += count
    return Layer(Adapter(torch.cat(distinct), b, scale), tuple(sources), kind)


def known_splits(config: Phi3Config) -> dict[str, Splits]:
    """The splits of a Phi-3's fused layers."""
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    q, kv = config.num_attention_heads * head, (config.num_key_value_heads or config.num_attention_heads) * head
    rows = {"qkv_proj": (q, kv, kv), "gate_up_proj": (config.intermediate_size,) * 2}
    return {name: Splits(sizes, (True,) * len(sizes)) for name, sizes in rows.items()}


def base_config(folder: Path, adapter: LoraConfig) -> Phi3Config | None:
    """The configuration of the base that is recorded with an adapter; None where it can't be had."""
    record = read_base(folder)
    path = record.path if record else adapter.base_model_name_or_path
    if not path:
        return None
    try:
        if path.startswith(synthetic.PREFIX):
            return synthetic.parse_shape(path)
        if Path(path).expanduser().is_dir() or path == "starter":
            return read_config(find_folder(path, None)[0])
        from huggingface_hub import hf_hub_download

        return read_config(Path(hf_hub_download(path, "config.json", revision=adapter.revision)).parent)
    except (PhinetuneError, OSError, ValueError):  # no network, no such repository, another kind of model
        return None


def target_names(layers: Mapping[str, Layer], count: int | None) -> list[str]:
    """`target_modules`: the last names where those mean just these layers of a model with `count`, else all in full."""
    places: dict[str, set[str]] = {}
    for name in layers:
        match = re.search(r"\.layers\.(\d+)\.", name)
        places.setdefault(_last(name), set()).add(match[1] if match else "")
    whole = {str(i) for i in range(count)} if count else None
    short = all(found in (whole, {""}) for found in places.values())
    return list(places) if short else list(layers)
