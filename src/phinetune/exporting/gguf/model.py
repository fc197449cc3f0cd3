"""Writing a model as one GGUF file, tensor by tensor. llama.cpp and all programs built on it read this file.

Names, keys, dtypes and shapes are those of llama.cpp's own converter (`Phi3MiniModel`; `LlamaModel` and `Qwen2Model` in
`split_form`), so the tensors are the same to the bit. Three things differ from that converter:

- The tokenizer comes from tokenizer.json (`phinetune.exporting.gguf.tokenizer`).
- Every id that ends a turn is written.
- `general.name` holds phi-3 only if llama.cpp must strip white space as Phi-3's tokenizer does.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType
from numpy.typing import NDArray
from transformers import Phi3Config

from phinetune.engine.families import ModelConfig, is_fused
from phinetune.errors import ModelError
from phinetune.exporting.checkpoint_source import Checkpoint
from phinetune.exporting.gguf import split_form
from phinetune.exporting.gguf.quantiser import check_quantiser, quantised
from phinetune.exporting.gguf.tokenizer import Vocabulary, read_vocabulary
from phinetune.exporting.gguf.types import FILE_TYPES, OUTPUT, TypeChoice
from phinetune.exporting.longrope import attention_factor, is_longrope, original_context, rope, trained_context

NAMED_PHI3 = re.compile(r"phi-?3", re.IGNORECASE)  # llama.cpp looks for phi-3 and phi3 in `general.name`

# The numpy dtype of a tensor that gguf has converted to a type. Tensors of all other types become bytes.
NUMPY: dict[GGMLQuantizationType, np.dtype[Any]] = {
    GGMLQuantizationType.F32: np.dtype(np.float32),
    GGMLQuantizationType.F16: np.dtype(np.float16),
}


@dataclass(frozen=True)
class GgufFile:
    """What a written GGUF file holds.

    Attributes:
        tensors: number of tensors.
        vocabulary: the tokenizer.
        context: tokens up to which llama.cpp computes what the model was trained with.
        notes: where llama.cpp differs from the model.
    """

    tensors: int
    vocabulary: Vocabulary
    context: int
    notes: list[str]


def write_gguf(source: Checkpoint, file: Path, kind: str, name: str) -> GgufFile:
    """Write `source` to `file`. At most one tensor is in memory.

    Args:
        kind: the type of the matrices, a key of `types.FILE_TYPES`. Vectors are always float32.
        name: the value of `general.name`.

    Raises:
        ModelError: the file can't hold this model, its tokenizer or one of its values, or the quantiser is missing.
    """
    check_shape(source)
    vocabulary = read_vocabulary(source.tokenizer, source.generation_config, source.config.vocab_size)
    writer = gguf.GGUFWriter(file, split_form.architecture(source.config))
    try:
        plan = _plan(source, kind)
        check_quantiser({tensor.type for tensor in plan})
        for tensor in plan:
            _announce(writer, tensor)
        _add_keys(writer, source.config, kind, general_name(name, vocabulary))
        vocabulary.write(writer)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in plan:
            writer.write_tensor_data(_data(source, tensor))
    finally:
        writer.close()
    context, window = trained_context(source.config), split_form.window(source.config)
    notes = list(vocabulary.notes)
    if window:
        notes.append(f"llama.cpp's Llama has no sliding window: it computes what the model does up to {window} tokens")
    return GgufFile(len(plan), vocabulary, min(context, window or context), notes)


def check_shape(source: Checkpoint) -> None:
    """Make sure that llama.cpp computes what this model computes.

    Raises:
        ModelError: it does not; the error lists all differences.
    """
    config, problems = source.config, []
    if config.hidden_act != "silu":
        problems.append(f"hidden_act is {config.hidden_act}, and llama.cpp's Phi-3 has only silu")
    head = getattr(config, "head_dim", None)
    if not is_fused(config):
        problems += split_form.not_held(config)
    elif head and head != config.hidden_size // config.num_attention_heads:
        problems.append(f"head_dim is {head}, and llama.cpp's Phi-3 divides hidden_size by num_attention_heads")
    if problems:
        raise ModelError([f"{source.base.path}: {problem}" for problem in problems])


def general_name(name: str, vocabulary: Vocabulary) -> str:
    """`name`, with phi-3 added or removed.

    llama.cpp strips white space after special tokens if `general.name` holds phi-3.
    """
    if vocabulary.strips:
        return name if NAMED_PHI3.search(name) else f"{name} (phi-3)"
    return NAMED_PHI3.sub("Phi 3", name)


def _rotary_dimensions(config: ModelConfig) -> int:
    part = rope(config).get("partial_rotary_factor", 1.0)
    return int(part * config.hidden_size) // int(config.num_attention_heads)


# -- keys ------------------------------------------------------------------------------------------------------


def _add_keys(writer: gguf.GGUFWriter, config: ModelConfig, kind: str, name: str) -> None:
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    total, shared, expert, count = writer.get_total_parameter_count()
    writer.add_size_label(gguf.size_label(total, shared, expert, count))
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads or config.num_attention_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(rope(config)["rope_theta"])
    writer.add_file_type(FILE_TYPES[kind][0])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    if isinstance(config, Phi3Config):
        _add_phi3_keys(writer, config)
    else:
        split_form.add_keys(writer, config)


def _add_phi3_keys(writer: gguf.GGUFWriter, config: Phi3Config) -> None:
    writer.add_rope_scaling_orig_ctx_len(original_context(config))
    writer.add_rope_dimension_count(_rotary_dimensions(config))
    if is_longrope(config):
        writer.add_rope_scaling_attn_factors(attention_factor(config))
    writer.add_sliding_window(config.sliding_window or 0)  # llama.cpp recognises Phi-4 by the 0


# -- tensors ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tensor:
    """One tensor of the file.

    Attributes:
        name: llama.cpp's name.
        source: transformers' name, or the numbers themselves.
        shape: the shape in torch's order, rows first.
        type: the type in which it is stored.
    """

    name: str
    source: str | NDArray[Any]
    shape: tuple[int, ...]
    type: GGMLQuantizationType


def tensor_names(config: ModelConfig) -> gguf.TensorNameMap:
    """The map from transformers' tensor names to llama.cpp's."""
    return gguf.get_tensor_name_map(split_form.ARCHITECTURES[config.model_type], config.num_hidden_layers)


def _plan(source: Checkpoint, kind: str) -> list[Tensor]:
    """All tensors of the file, in the file's order."""
    names = tensor_names(source.config)
    plan = []
    if is_longrope(source.config):
        for key, tensor in (
            ("long_factor", gguf.MODEL_TENSOR.ROPE_FACTORS_LONG),
            ("short_factor", gguf.MODEL_TENSOR.ROPE_FACTORS_SHORT),
        ):
            factors = np.array(rope(source.config)[key], dtype=np.float32)
            factors_name = f"{gguf.TENSOR_NAMES[tensor]}.weight"
            plan.append(Tensor(factors_name, factors, factors.shape, GGMLQuantizationType.F32))
    scaling = None if is_fused(source.config) else split_form.frequency_factors(source.config)
    if scaling is not None:
        factors_name = f"{gguf.TENSOR_NAMES[gguf.MODEL_TENSOR.ROPE_FREQS]}.weight"
        plan.append(Tensor(factors_name, scaling, scaling.shape, GGMLQuantizationType.F32))
    named = {name: names.get_name(name, try_suffixes=(".weight", ".bias")) for name in source.names()}
    choice = TypeChoice(kind, source.config.num_hidden_layers, OUTPUT not in named.values())
    for name, gguf_name in named.items():
        if gguf_name is None:
            raise ModelError(f"{source.base.path}: llama.cpp has no tensor for {name}")
        shape = source.shape_of(name)
        plan.append(Tensor(gguf_name, name, shape, choice.of(gguf_name, shape)))
    return plan


def _announce(writer: gguf.GGUFWriter, tensor: Tensor) -> None:
    block, size = gguf.GGML_QUANT_SIZES[tensor.type]
    bytes_ = math.prod(tensor.shape) // block * size
    dtype = NUMPY.get(tensor.type)
    if dtype:
        writer.add_tensor_info(tensor.name, tensor.shape, dtype, bytes_, tensor.type)
    else:
        shape = gguf.quant_shape_to_byte_shape(tensor.shape, tensor.type)
        writer.add_tensor_info(tensor.name, shape, np.dtype(np.uint8), bytes_, tensor.type)


def _data(source: Checkpoint, tensor: Tensor) -> NDArray[Any]:
    if isinstance(tensor.source, np.ndarray):
        return quantised(tensor.source, tensor.type, tensor.name)
    numbers = split_form.in_file_order(tensor.source, as_array(source.tensor(tensor.source)), source.config)
    return quantised(numbers, tensor.type, tensor.name)


def as_array(tensor: torch.Tensor) -> NDArray[Any]:
    """The tensor as a float32 array of numpy."""
    return tensor.detach().float().contiguous().numpy()
