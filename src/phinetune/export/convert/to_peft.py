"""loralib's adapters as PEFT's: `MergedLinear`'s become one adapter over all rows.

With g adapted splits of rank r, that one has rank g·r:

    A = [A_q; A_k; A_v]        (g·r, in), as loralib stacks it
    B = diag(B_q, B_k, B_v)    (out, g·r), zero rows where a split has no adapter
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor

from phinetune.errors import ModelError, at_most
from phinetune.export.convert.layers import Adapter, Layer, Splits, ends_with, splits_of, unmatched

# loralib's file does not tell an embedding from a linear layer.
KNOWN_EMBEDDINGS = ("embed_tokens", "word_embeddings", "wte", "wpe")


def to_peft(
    pairs: Mapping[str, tuple[Tensor, Tensor]],
    lora_alpha: float,
    fused: Mapping[str, Splits],
    embedding: Sequence[str] = (),
    linear: Sequence[str] = (),
) -> dict[str, Layer]:
    """The layers of a loralib checkpoint in PEFT's form.

    Args:
        pairs: lora_A and lora_B by the layer's name.
        lora_alpha: the layers' alpha.
        fused: the splits of `MergedLinear`s by the end of their names.
        embedding: the ends of embeddings' names beside those of `KNOWN_EMBEDDINGS`.
        linear: the ends of names of linear layers that would be taken for convolutions.

    Raises:
        ModelError: all layers that can't be converted so.
    """
    names = list(pairs)
    problems = unmatched("--merged", fused, names) + unmatched("--embedding", embedding, names)
    problems += unmatched("--linear", linear, names)
    embeddings = {name for name in names if any(ends_with(name, end) for end in (*embedding, *KNOWN_EMBEDDINGS))}
    sure = embeddings | {name for name in names if any(ends_with(name, end) for end in linear)}
    problems += _wrong_layers(pairs, fused, sure)
    if problems:
        raise ModelError(at_most(problems))
    layers = {}
    for name, (a, b) in pairs.items():
        source = Adapter(a, b, lora_alpha / b.shape[1], name in embeddings, splits_of(name, fused))
        kind = "MergedLinear" if source.splits else "Embedding" if source.embedding else "Linear"
        layers[name] = Layer(_stacked(source), ((0, source),), kind)
    return layers


def _wrong_layers(
    pairs: Mapping[str, tuple[Tensor, Tensor]], fused: Mapping[str, Splits], sure: set[str]
) -> Iterator[str]:
    smallest = min(b.shape[1] for _, b in pairs.values())
    for name, (a, b) in pairs.items():
        splits = splits_of(name, fused)
        if splits:
            yield from _wrong_merged(name, a, b, splits)
        elif a.shape[0] != b.shape[1]:
            yield _asks_for_merged(name, a, b)
        elif name not in sure and _looks_like_a_convolution(name, a, b, smallest):
            yield (
                f"{name}: looks like a convolution's adapter (lora_A {tuple(a.shape)}, lora_B {tuple(b.shape)}), and "
                f"PEFT has no form for loralib's; if it is a linear layer, add --linear {name}"
            )


def _wrong_merged(name: str, a: Tensor, b: Tensor, splits: Splits) -> list[str]:
    problems = []
    if a.shape[0] != sum(splits.on) * b.shape[1]:
        problems.append(
            f"{name}: --merged says {sum(splits.on)} splits with adapters; lora_A has {a.shape[0]} rows, which is not "
            f"{sum(splits.on)} times lora_B's {b.shape[1]} columns"
        )
    if b.shape[0] != splits.adapted_rows:
        problems.append(f"{name}: --merged gives the adapters {splits.adapted_rows} rows; lora_B has {b.shape[0]}")
    return problems


def _asks_for_merged(name: str, a: Tensor, b: Tensor) -> str:
    rows, rank = a.shape[0], b.shape[1]
    if rows % rank:
        return f"{name}: lora_A has {rows} rows and lora_B {rank} columns, which don't go together"
    return (
        f"{name}: a MergedLinear's adapter, {rows // rank} splits of rank {rank} with {b.shape[0]} rows together: say "
        f"which with --merged {name.rsplit('.', 1)[-1]}=ROWS,ROWS,… (-ROWS for a split without an adapter)"
    )


def _looks_like_a_convolution(name: str, a: Tensor, b: Tensor, smallest: int) -> bool:
    """By its name, or by a rank r·k beside linear layers' r (`smallest`) with in·k and out·k features, k odd."""
    if "conv" in name.rsplit(".", 1)[-1].lower():
        return True
    times, rest = divmod(a.shape[0], smallest)
    return rest == 0 and times > 1 and times % 2 == 1 and a.shape[1] % times == 0 and b.shape[0] % times == 0


def _stacked(source: Adapter) -> Adapter:
    """PEFT's one adapter for a `MergedLinear`'s: A as it is, B block-diagonal, the scale kept. Others as they are."""
    if source.splits is None:
        return source
    rank = source.rank
    b = source.b.new_zeros(source.out, source.a.shape[0])
    for i, (rows, held) in enumerate(source.splits.spans()):
        b[rows, i * rank : (i + 1) * rank] = source.b[held]
    return Adapter(source.a, b, source.scale)
