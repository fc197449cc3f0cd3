"""PEFT's adapters as loralib's: one alpha for all layers, and fused layers as `MergedLinear`.

A fused layer's one adapter becomes an adapter a split of the same rank, A shared by them (the update is the same). The
adapters of split layers (`q_proj`, `k_proj`, `v_proj`) are stacked under the fused layer's name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from phinetune.checkpoints.adapters import FUSED
from phinetune.errors import ModelError, at_most
from phinetune.export.convert.layers import Adapter, Layer, Splits, splits_of, unmatched


def to_loralib(adapters: Mapping[str, Adapter], alpha: float, fused: Mapping[str, Splits]) -> dict[str, Layer]:
    """The layers of a PEFT adapter in loralib's form, all with `alpha`: what its scale lacks goes into B.

    Args:
        adapters: by the layer's name.
        fused: the splits of fused layers by the end of their names.

    Raises:
        ModelError: all layers that can't be converted so.
    """
    groups = _grouped(adapters, fused)
    problems = unmatched("--merged", fused, list(groups))
    for name, parts in groups.items():
        splits = splits_of(name, fused)
        if splits is None:
            continue
        if "" in parts:
            problems += _wrong_fused(name, parts, splits)
        else:
            problems += _wrong_parts(name, parts, splits)
    if problems:
        raise ModelError(at_most(problems))
    return {name: _as_loralib(name, parts, splits_of(name, fused), alpha) for name, parts in groups.items()}


def _grouped(adapters: Mapping[str, Adapter], fused: Mapping[str, Splits]) -> dict[str, dict[str, Adapter]]:
    """By the result's layers: `{"": adapter}`, or the split adapters (`{"q_proj": …, "v_proj": …}`) of a fused one."""
    groups: dict[str, dict[str, Adapter]] = {}
    for name, adapter in adapters.items():
        path, _, last = name.rpartition(".")
        whole = f"{path}.{FUSED.get(last, last)}".lstrip(".")
        if last in FUSED and splits_of(whole, fused):
            groups.setdefault(whole, {})[last] = adapter
        else:
            groups.setdefault(name, {})[""] = adapter
    return groups


def _part_names(name: str) -> list[str]:
    """The split layers that the fused layer `name` stands for, in the order of its rows."""
    return [part for part, whole in FUSED.items() if whole == name.rsplit(".", 1)[-1]]


def _wrong_fused(name: str, parts: Mapping[str, Adapter], splits: Splits) -> list[str]:
    adapter = parts[""]
    if len(parts) > 1:
        return [f"{name}: has an adapter itself and adapters of its splits"]
    if adapter.embedding:
        return [f"{name}: --merged is for linear layers, and this is an embedding"]
    if adapter.out != splits.out:
        return [f"{name}: --merged adds up to {splits.out} rows; the layer has {adapter.out}"]
    kept = torch.zeros(adapter.out, dtype=torch.bool)
    for rows, _ in splits.spans():
        kept[rows] = True
    if adapter.b[~kept].any():
        return [f"{name}: --merged says that a split has no adapter, and lora_B's rows there are not zero"]
    return []


def _wrong_parts(name: str, parts: Mapping[str, Adapter], splits: Splits) -> list[str]:
    order = _part_names(name)
    if len(splits.rows) != len(order):
        return [f"{name}: --merged gives {len(splits.rows)} splits; it stands for {', '.join(order)}"]
    problems = []
    for part, rows, on in zip(order, splits.rows, splits.on, strict=True):
        if part in parts and not on:
            problems.append(f"{name}: --merged says that {part} has no adapter, and it has one")
        if part in parts and parts[part].out != rows:
            problems.append(f"{name}: --merged gives {part} {rows} rows; it has {parts[part].out}")
    ranks = {part: parts[part].rank for part in order if part in parts}
    if len(set(ranks.values())) > 1:
        told = ", ".join(f"{part} {rank}" for part, rank in ranks.items())
        problems.append(f"{name}: a MergedLinear's adapters have one rank; here {told}")
    if len({adapter.a.shape[1] for adapter in parts.values()}) > 1:
        problems.append(f"{name}: {', '.join(ranks)} take inputs of unlike widths, so they are not one layer's splits")
    return problems


def _as_loralib(name: str, parts: Mapping[str, Adapter], splits: Splits | None, alpha: float) -> Layer:
    if splits and "" not in parts:
        return _joined([parts.get(part) for part in _part_names(name)], splits.rows, alpha)
    source = parts[""]
    if splits:
        return Layer(_cut(source, splits, alpha), ((0, source),), "MergedLinear")
    made = Adapter(source.a, _baked(source, alpha, source.rank), alpha / source.rank, source.embedding)
    return Layer(made, ((0, source),), "Embedding" if source.embedding else "Linear")


def _joined(parts: Sequence[Adapter | None], rows: tuple[int, ...], alpha: float) -> Layer:
    """A `MergedLinear` of split layers' adapters; None is a split without one."""
    there = [part for part in parts if part]
    rank = there[0].rank
    a = torch.cat([part.a for part in there])
    b = torch.cat([_baked(part, alpha, rank) for part in there])
    made = Adapter(a, b, alpha / rank, splits=Splits(rows, tuple(part is not None for part in parts)))
    starts = [sum(rows[:i]) for i in range(len(rows))]
    sources = tuple((start, part) for start, part in zip(starts, parts, strict=True) if part)
    return Layer(made, sources, "MergedLinear")


def _cut(source: Adapter, splits: Splits, alpha: float) -> Adapter:
    """A `MergedLinear` of one adapter over all rows: A shared by the splits, B's rows cut.

    Where B is block-diagonal, as `_stacked` makes it, each split gets its own part of A back.
    """
    adapted = sum(splits.on)
    rank = source.rank // adapted
    spans = list(splits.spans())
    columns = [slice(i * rank, (i + 1) * rank) for i in range(adapted)]
    if adapted > 1 and source.rank == adapted * rank and _is_block_diagonal(source.b, spans, columns):
        b = _baked(source, alpha, rank)
        blocks = [b[rows, own] for (rows, _), own in zip(spans, columns, strict=True)]
        return Adapter(source.a, torch.cat(blocks), alpha / rank, splits=splits)
    b = _baked(source, alpha, source.rank)
    a = source.a.repeat(adapted, 1)
    return Adapter(a, torch.cat([b[rows] for rows, _ in spans]), alpha / source.rank, splits=splits)


def _is_block_diagonal(b: Tensor, spans: Sequence[tuple[slice, slice]], columns: Sequence[slice]) -> bool:
    rest = b.clone()
    for (rows, _), own in zip(spans, columns, strict=True):
        if not b[rows, own].any():
            return False
        rest[rows, own] = 0
    return not rest.any()


def _baked(source: Adapter, alpha: float, rank: int) -> Tensor:
    """B such that alpha / rank scales it to the source's update; in float32 where its own dtype would round it."""
    return source.with_scale(alpha / rank).b


def constructors(layers: Mapping[str, Layer], alpha: float, turned: bool) -> list[str]:
    """How to build the layers that take the adapters: a line for each way, and the layers it is for.

    Args:
        turned: whether the base's weights are stored as (in, out).
    """
    calls: dict[str, list[str]] = {}
    for name, layer in layers.items():
        calls.setdefault(_call(layer, alpha, turned), []).append(name)
    lines = [f"{call}  # {_told(names, layers)}" for call, names in calls.items()]
    if any(layer.made.splits and len(set(layer.made.splits.rows)) > 1 for layer in layers.values()):
        lines.append("(splits of unlike size need phinetune.lora: loralib itself has equal ones only)")
    return lines


def _call(layer: Layer, alpha: float, turned: bool) -> str:
    made, splits = layer.made, layer.made.splits
    out: int | list[int] = made.out
    if splits and len(set(splits.rows)) > 1:
        out = list(splits.rows)
    sizes = f"{made.a.shape[1]}, {out}"
    options = f", r={made.rank}, lora_alpha={alpha:.12g}" + (f", enable_lora={list(splits.on)}" if splits else "")
    options += ", fan_in_fan_out=True" if turned and not made.embedding else ""
    return f"lora.{layer.kind}({sizes}{options})"


def _told(names: Sequence[str], layers: Mapping[str, Layer]) -> str:
    """The layers' names: by their last part where that says it."""
    lasts = {name.rsplit(".", 1)[-1] for name in names}
    same = [name for name in layers if name.rsplit(".", 1)[-1] in lasts]
    return f"{', '.join(sorted(lasts))} ({len(names)})" if len(same) == len(names) else ", ".join(names)
