"""Writing an adapter alone as a LoRA file of llama.cpp. llama.cpp applies it when it loads a GGUF of the base.

llama.cpp scales B A by alpha / r. Each pair has its own r, and the whole file has one alpha. If PEFT's scale is
another (rsLoRA, patterns of alphas), B is multiplied by the ratio of the two scales.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from phinetune.checkpoints.whole import EMBED, HEAD
from phinetune.errors import ModelError, at_most
from phinetune.exporting.gguf import split_form
from phinetune.exporting.gguf.model import as_array, tensor_names
from phinetune.exporting.gguf.quantiser import quantised
from phinetune.exporting.gguf.types import TypeChoice
from phinetune.exporting.merge.merged import MergedCheckpoint
from phinetune.exporting.merge.weight_deltas import WeightDelta, read_weight_deltas

INSTEAD = "export the merged model instead, with --to gguf"


def write_gguf_lora(run: MergedCheckpoint, file: Path, kind: str, name: str) -> int:
    """Write the adapter of `run` to `file`. Returns the number of its layers.

    Args:
        kind: the type of the matrices: f32, f16, bf16 or q8_0.
        name: the value of `general.name`.

    Raises:
        ModelError: the adapter is more than LoRA's A and B, or llama.cpp can't apply it to the layers that it is for.
    """
    _, deltas = read_weight_deltas(run.config, run.adapter, run.source)
    _check_lora_file_holds(deltas, run)
    alpha = float(run.adapter.lora_alpha)
    names = tensor_names(run.config)
    writer = gguf.GGUFWriter(file, split_form.architecture(run.config))
    try:
        for weight, delta in deltas.items():
            gguf_weight = names.get_name(weight, try_suffixes=(".weight",))
            for end, numbers in _pair(delta, alpha):
                numbers = split_form.in_file_order(weight, numbers, run.config) if end == "lora_b" else numbers
                tensor = f"{gguf_weight}.{end}"
                type_ = TypeChoice(kind).of(tensor, numbers.shape)
                writer.add_tensor(tensor, quantised(numbers, type_, tensor), raw_dtype=type_)
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
    return len(deltas)


def _check_lora_file_holds(deltas: dict[str, WeightDelta], run: MergedCheckpoint) -> None:
    problems = []
    if not run.adapter.lora_alpha > 0:
        problems.append(f"lora_alpha is {run.adapter.lora_alpha}, and llama.cpp would ignore it; {INSTEAD}")
    for name, delta in deltas.items():
        if delta.a is None:
            problems.append(f"{name}: the adapter replaces it, and llama.cpp's LoRA has only A and B; {INSTEAD}")
        elif delta.magnitude is not None:
            problems.append(f"{name}: DoRA's magnitude has no place in llama.cpp's LoRA; {INSTEAD}")
    base_is_tied = run.config.tie_word_embeddings or run.untied
    for name in sorted({EMBED, HEAD} & deltas.keys()) if base_is_tied else ():
        problems.append(
            f"{name}: the base's embedding and output head are one, and llama.cpp would change both; {INSTEAD}"
        )
    if problems:
        raise ModelError([f"{run.source}: {problem}" for problem in at_most(problems, 8)])


def _pair(delta: WeightDelta, alpha: float) -> Iterator[tuple[str, NDArray[Any]]]:
    """lora_a (r, in) and lora_b (out, r), with B multiplied by the ratio of the scale and alpha / r.

    An embedding's A is transposed to (tokens, r), because llama.cpp looks up its rows.
    """
    assert delta.a is not None
    assert delta.b is not None
    a, b = as_array(delta.a), as_array(delta.b)
    factor = delta.scale * b.shape[1] / alpha
    if abs(factor - 1) > 1e-12:
        b = (b.astype(np.float64) * factor).astype(np.float32)
    yield "lora_a", np.ascontiguousarray(a.T) if delta.embedding else a
    yield "lora_b", b
