"""An adapter alone as llama.cpp's LoRA file, which is laid on a GGUF of its base when that is loaded.

llama.cpp multiplies B·A with alpha over the rank of each pair, one alpha for the file. Where PEFT's scales are others
(rsLoRA, patterns of alphas), what is left of them goes into B.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from phinetune.errors import ModelError, at_most
from phinetune.export.gguf.model import ARCHITECTURE, as_array, stored, stored_type, tensor_names
from phinetune.export.merge.merged import MergedCheckpoint
from phinetune.export.merge.weight_deltas import EMBED, HEAD, Change, read_changes

INSTEAD = "export the merged model instead, with --to gguf"


def write_gguf_lora(run: MergedCheckpoint, file: Path, kind: str, name: str) -> int:
    """Write the adapter of `run` to `file`; how many layers it has.

    Args:
        kind: f32, f16, bf16 or q8_0: the type of the matrices.
        name: what `general.name` says.

    Raises:
        ModelError: an adapter that is more than LoRA's A and B, or that sits where llama.cpp can't lay it on.
    """
    _, changes = read_changes(run.config, run.adapter, run.source)
    _check_plain(run, changes)
    alpha = float(run.adapter.lora_alpha)
    names = tensor_names(run.config)
    writer = gguf.GGUFWriter(file, ARCHITECTURE)
    try:
        for theirs, change in changes.items():
            target = names.get_name(theirs, try_suffixes=(".weight",))
            for end, numbers in _pair(change, alpha):
                full = f"{target}.{end}"
                type_ = stored_type(full, numbers.shape, kind)
                writer.add_tensor(full, stored(numbers, type_, full), raw_dtype=type_)
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_name(name)
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()
    return len(changes)


def _check_plain(run: MergedCheckpoint, changes: dict[str, Change]) -> None:
    problems = []
    if not run.adapter.lora_alpha > 0:
        problems.append(f"lora_alpha is {run.adapter.lora_alpha}, which llama.cpp takes for none given; {INSTEAD}")
    for name, change in changes.items():
        if change.a is None:
            problems.append(f"{name}: it is replaced whole, and llama.cpp's LoRA has A and B alone; {INSTEAD}")
        elif change.magnitude is not None:
            problems.append(f"{name}: DoRA's magnitude has no place in llama.cpp's LoRA; {INSTEAD}")
    one = run.config.tie_word_embeddings or run.untied
    for name in sorted({EMBED, HEAD} & changes.keys()) if one else ():
        problems.append(
            f"{name}: the base's embedding and output head are one, and llama.cpp would change both; {INSTEAD}"
        )
    if problems:
        raise ModelError([f"{run.source}: {problem}" for problem in at_most(problems, 8)])


def _pair(change: Change, alpha: float) -> Iterator[tuple[str, NDArray[Any]]]:
    """lora_a (r, in) and lora_b (out, r), B with what alpha over the rank leaves of the scale.

    An embedding's A is turned to (tokens, r), since its rows are looked up.
    """
    assert change.a is not None
    assert change.b is not None
    a, b = as_array(change.a), as_array(change.b)
    left = change.scale * b.shape[1] / alpha
    if abs(left - 1) > 1e-12:
        b = (b.astype(np.float64) * left).astype(np.float32)
    yield "lora_a", np.ascontiguousarray(a.T) if change.embedding else a
    yield "lora_b", b
