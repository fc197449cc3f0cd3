"""From PEFT's adapters to loralib's: one alpha for all layers, and fused layers as `MergedLinear`.

The one adapter of a fused layer becomes one adapter per split, all with the same A and the same rank; the update stays
the same. The adapters of split layers (`q_proj`, `k_proj`, `v_proj`) are stacked under the fused layer's name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from phinetune.checkpoints.target_modules import FUSED
from phinetune.errors import ModelError, at_most
from phinetune.exporting.convert.layers import Adapter, ConvertedLayer, Splits, last_part, splits_of, unmatched


def to_loralib(adapters: Mapping[str, Adapter], alpha: float, fused: Mapping[str, Splits]) -> dict[str, ConvertedLayer]:
    """The layers of a PEFT adapter in loralib's form. All have `alpha`; other scales are multiplied into B.

    Args:
        adapters: the adapters by layer name.
        fused: the splits of fused layers, by the end of the layers' names.

    Raises:
        ModelError: layers can't be converted; the error lists all of them.
    """
    groups = _grouped(adapters, fused)
    problems = unmatched("--merged", fused, list(groups))
    for name, parts in groups.items():
        splits = splits_of(name, fused)
        if splits is None:
            continue
        problems += (_wrong_fused if "" in parts else _wrong_parts)(name, parts, splits)
    if problems:
        raise ModelError(at_most(problems))
    return {name: _as_loralib(name, parts, splits_of(name, fused), alpha) for name, parts in groups.items()}


def _grouped(adapters: Mapping[str, Adapter], fused: Mapping[str, Splits]) -> dict[str, dict[str, Adapter]]:
    """The adapters by layer of the result.

    A layer with an adapter of its own has `{"": adapter}`; a layer to fuse has its parts, `{"q_proj": …, "v_proj": …}`.
    """
    groups: dict[str, dict[str, Adapter]] = {}
    for name, adapter in adapters.items():
        path, _, last = name.rpartition(".")
        fused_name = f"{path}.{FUSED.get(last, last)}".lstrip(".")
        if last in FUSED and splits_of(fused_name, fused):
            groups.setdefault(fused_name, {})[last] = adapter
        else:
            groups.setdefault(name, {})[""] = adapter
    return groups


def _part_names(name: str) -> list[str]:
    """The split layers that make up the fused layer `name`, in the order of its rows."""
    return [part for part, fused_name in FUSED.items() if fused_name == last_part(name)]


def _wrong_fused(name: str, parts: Mapping[str, Adapter], splits: Splits) -> list[str]:
    adapter = parts[""]
    if len(parts) > 1:
        return [f"{name}: has an adapter, and its splits have adapters, too"]
    if adapter.embedding:
        return [f"{name}: --merged is for linear layers, and this is an embedding"]
    if adapter.out != splits.out:
        return [f"{name}: --merged adds up to {splits.out} rows; the layer has {adapter.out}"]
    adapted = torch.zeros(adapter.out, dtype=torch.bool)
    for rows, _ in splits.spans():
        adapted[rows] = True
    if adapter.b[~adapted].any():
        return [f"{name}: --merged says that a split has no adapter, but its rows of lora_B are not zero"]
    return []


def _wrong_parts(name: str, parts: Mapping[str, Adapter], splits: Splits) -> list[str]:
    order = _part_names(name)
    if len(splits.rows) != len(order):
        return [f"{name}: --merged gives {len(splits.rows)} splits; the layer has {', '.join(order)}"]
    problems = []
    for part, rows, adapted in zip(order, splits.rows, splits.adapted, strict=True):
        if part in parts and not adapted:
            problems.append(f"{name}: --merged says that {part} has no adapter, but it has one")
        if part in parts and parts[part].out != rows:
            problems.append(f"{name}: --merged gives {part} {rows} rows; it has {parts[part].out}")
    ranks = {part: parts[part].rank for part in order if part in parts}
    if len(set(ranks.values())) > 1:
        listed = ", ".join(f"{part} {rank}" for part, rank in ranks.items())
        problems.append(f"{name}: the adapters of a MergedLinear must have the same rank; here they have {listed}")
    if len({adapter.a.shape[1] for adapter in parts.values()}) > 1:
        problems.append(
            f"{name}: {', '.join(ranks)} take inputs of different widths, so they are not splits of one layer"
        )
    return problems


def _as_loralib(name: str, parts: Mapping[str, Adapter], splits: Splits | None, alpha: float) -> ConvertedLayer:
    if splits and "" not in parts:
        return _joined([parts.get(part) for part in _part_names(name)], splits.rows, alpha)
    source = parts[""]
    if splits:
        return ConvertedLayer(_cut(source, splits, alpha), ((0, source),), "MergedLinear")
    adapter = source.with_scale(alpha / source.rank)
    return ConvertedLayer(adapter, ((0, source),), "Embedding" if source.embedding else "Linear")


def _joined(parts: Sequence[Adapter | None], rows: tuple[int, ...], alpha: float) -> ConvertedLayer:
    """A `MergedLinear` made from the adapters of split layers; None is a split without an adapter."""
    adapted = [part for part in parts if part]
    rank = adapted[0].rank
    a = torch.cat([part.a for part in adapted])
    b = torch.cat([_scaled_b(part, alpha, rank) for part in adapted])
    adapter = Adapter(a, b, alpha / rank, splits=Splits(rows, tuple(part is not None for part in parts)))
    starts = [sum(rows[:i]) for i in range(len(rows))]
    sources = tuple((start, part) for start, part in zip(starts, parts, strict=True) if part)
    return ConvertedLayer(adapter, sources, "MergedLinear")


def _cut(source: Adapter, splits: Splits, alpha: float) -> Adapter:
    """A `MergedLinear` made from one adapter over all rows. Each split gets the whole A and its own rows of B.

    If B is block-diagonal, as `to_peft` makes it, each split gets back its own part of A.
    """
    count = sum(splits.adapted)
    rank = source.rank // count
    spans = list(splits.spans())
    columns = [slice(i * rank, (i + 1) * rank) for i in range(count)]
    if count > 1 and source.rank == count * rank and _is_block_diagonal(source.b, spans, columns):
        b = _scaled_b(source, alpha, rank)
        blocks = [b[rows, own] for (rows, _), own in zip(spans, columns, strict=True)]
        return Adapter(source.a, torch.cat(blocks), alpha / rank, splits=splits)
    b = _scaled_b(source, alpha, source.rank)
    a = source.a.repeat(count, 1)
    return Adapter(a, torch.cat([b[rows] for rows, _ in spans]), alpha / source.rank, splits=splits)


def _is_block_diagonal(b: Tensor, spans: Sequence[tuple[slice, slice]], columns: Sequence[slice]) -> bool:
    """Whether B has a block that is not zero for each split, and zeros outside these blocks."""
    rest = b.clone()
    for (rows, _), own in zip(spans, columns, strict=True):
        if not b[rows, own].any():
            return False
        rest[rows, own] = 0
    return not rest.any()


def _scaled_b(source: Adapter, alpha: float, rank: int) -> Tensor:
    """B such that the scale alpha / rank gives the source's update."""
    return source.with_scale(alpha / rank).b


def constructors(layers: Mapping[str, ConvertedLayer], alpha: float, fan_in_fan_out: bool) -> list[str]:
    """The lines of code that build the layers for the adapters, each with the names of its layers.

    Args:
        fan_in_fan_out: whether the base's weights are stored as (in, out).
    """
    calls: dict[str, list[str]] = {}
    for name, layer in layers.items():
        calls.setdefault(_call(layer, alpha, fan_in_fan_out), []).append(name)
    lines = [f"{call}  # {_listed(names, layers)}" for call, names in calls.items()]
    if any(_has_unequal_splits(layer.adapter) for layer in layers.values()):
        lines.append("(splits of different sizes need phinetune.lora: loralib has only equal splits)")
    return lines


def _has_unequal_splits(adapter: Adapter) -> bool:
    return adapter.splits is not None and len(set(adapter.splits.rows)) > 1


def _call(layer: ConvertedLayer, alpha: float, fan_in_fan_out: bool) -> str:
    adapter, splits = layer.adapter, layer.adapter.splits
    out = list(splits.rows) if splits and _has_unequal_splits(adapter) else adapter.out
    options = f"r={adapter.rank}, lora_alpha={alpha:.12g}"
    options += f", enable_lora={list(splits.adapted)}" if splits else ""
    options += ", fan_in_fan_out=True" if fan_in_fan_out and not adapter.embedding else ""
    return f"lora.{layer.kind}({adapter.a.shape[1]}, {out}, {options})"


def _listed(names: Sequence[str], layers: Mapping[str, ConvertedLayer]) -> str:
    """The names for the report. The last parts are enough if no other layer has them."""
    lasts = {last_part(name) for name in names}
    same = [name for name in layers if last_part(name) in lasts]
    return f"{', '.join(sorted(lasts))} ({len(names)})" if len(same) == len(names) else ", ".join(names)
