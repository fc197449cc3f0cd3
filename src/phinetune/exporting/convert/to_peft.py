"""From loralib's adapters to PEFT's. The adapters of a `MergedLinear` become one adapter over all rows.

With g adapted splits of rank r, the one adapter has rank g·r:

    A = [A_q; A_k; A_v]        (g·r, in), as loralib stacks it
    B = diag(B_q, B_k, B_v)    (out, g·r), with zero rows for a split without an adapter
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor

from phinetune.errors import ModelError, at_most
from phinetune.exporting.convert.layers import (
    Adapter,
    ConvertedLayer,
    Splits,
    ends_with,
    last_part,
    splits_of,
    unmatched,
)

# Names of embeddings. loralib's file does not say whether a layer is an embedding or a linear layer.
KNOWN_EMBEDDINGS = ("embed_tokens", "word_embeddings", "wte", "wpe")


def to_peft(
    pairs: Mapping[str, tuple[Tensor, Tensor]],
    lora_alpha: float,
    fused: Mapping[str, Splits],
    embedding: Sequence[str] = (),
    linear: Sequence[str] = (),
) -> dict[str, ConvertedLayer]:
    """The layers of a loralib checkpoint in PEFT's form.

    Args:
        pairs: lora_A and lora_B by layer name.
        lora_alpha: the layers' alpha.
        fused: the splits of each `MergedLinear`, by the end of the layers' names.
        embedding: ends of names of embeddings, in addition to `KNOWN_EMBEDDINGS`.
        linear: ends of names of linear layers that look like convolutions.

    Raises:
        ModelError: layers can't be converted; the error lists all of them.
    """
    names = list(pairs)
    problems = unmatched("--merged", fused, names) + unmatched("--embedding", embedding, names)
    problems += unmatched("--linear", linear, names)
    embeddings = {name for name in names if any(ends_with(name, end) for end in (*embedding, *KNOWN_EMBEDDINGS))}
    known = embeddings | {name for name in names if any(ends_with(name, end) for end in linear)}
    problems += _wrong_layers(pairs, fused, known)
    if problems:
        raise ModelError(at_most(problems))
    layers = {}
    for name, (a, b) in pairs.items():
        source = Adapter(a, b, lora_alpha / b.shape[1], name in embeddings, splits_of(name, fused))
        kind = "MergedLinear" if source.splits else "Embedding" if source.embedding else "Linear"
        layers[name] = ConvertedLayer(_stacked(source), ((0, source),), kind)
    return layers


def _wrong_layers(
    pairs: Mapping[str, tuple[Tensor, Tensor]], fused: Mapping[str, Splits], known: set[str]
) -> Iterator[str]:
    smallest = min(b.shape[1] for _, b in pairs.values())
    for name, (a, b) in pairs.items():
        splits = splits_of(name, fused)
        if splits:
            yield from _wrong_merged(name, a, b, splits)
        elif a.shape[0] != b.shape[1]:
            yield _asks_for_merged(name, a, b)
        elif name not in known and _looks_like_a_convolution(name, a, b, smallest):
            yield (
                f"{name}: looks like a convolution's adapter (lora_A {tuple(a.shape)}, lora_B {tuple(b.shape)}), and "
                f"loralib's convolutions have no form in PEFT; if it is a linear layer, add --linear {name}"
            )


def _wrong_merged(name: str, a: Tensor, b: Tensor, splits: Splits) -> list[str]:
    problems = []
    count = sum(splits.adapted)
    if a.shape[0] != count * b.shape[1]:
        problems.append(
            f"{name}: --merged says {count} splits with adapters; lora_A has {a.shape[0]} rows, which is not {count} "
            f"times lora_B's {b.shape[1]} columns"
        )
    if b.shape[0] != splits.adapted_rows:
        problems.append(f"{name}: --merged gives the adapters {splits.adapted_rows} rows; lora_B has {b.shape[0]}")
    return problems


def _asks_for_merged(name: str, a: Tensor, b: Tensor) -> str:
    rows, rank = a.shape[0], b.shape[1]
    if rows % rank:
        return f"{name}: lora_A has {rows} rows and lora_B {rank} columns, which do not fit together"
    return (
        f"{name}: a MergedLinear's adapter, {rows // rank} splits of rank {rank} with {b.shape[0]} rows together; give "
        f"the splits with --merged {last_part(name)}=ROWS,ROWS,… (-ROWS for a split without an adapter)"
    )


def _looks_like_a_convolution(name: str, a: Tensor, b: Tensor, smallest: int) -> bool:
    """Whether an adapter may belong to a convolution, judged by its name or by its sizes.

    A convolution with kernel size k, an odd number, has k times the rank of the linear layers (`smallest`), and its
    numbers of input and output features are multiples of k.
    """
    if "conv" in last_part(name).lower():
        return True
    times, rest = divmod(a.shape[0], smallest)
    return rest == 0 and times > 1 and times % 2 == 1 and a.shape[1] % times == 0 and b.shape[0] % times == 0


def _stacked(source: Adapter) -> Adapter:
    """The adapters of a `MergedLinear` as one: A and scale stay, B becomes block-diagonal. Others are not changed."""
    if source.splits is None:
        return source
    rank = source.rank
    b = source.b.new_zeros(source.out, source.a.shape[0])
    for i, (rows, rows_of_b) in enumerate(source.splits.spans()):
        b[rows, i * rank : (i + 1) * rank] = source.b[rows_of_b]
    return Adapter(source.a, b, source.scale)
