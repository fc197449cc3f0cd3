"""A Phi-3 as one GGUF file for llama.cpp and all that is built on it, written tensor by tensor.

Names, keys, dtypes and shapes are those of llama.cpp's own converter (`Phi3MiniModel`), so the tensors are the same to
the bit. Beyond it: the tokenizer is taken from tokenizer.json (`gguf_vocab`), every id that ends a turn is written, and
`general.name` says phi-3 where, and only where, llama.cpp must strip white space as Phi-3's tokenizer does.
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
from gguf import GGMLQuantizationType, LlamaFileType
from numpy.typing import NDArray
from transformers import Phi3Config

from phinetune.errors import ModelError
from phinetune.export.gguf.tokenizer import Vocabulary, read_vocabulary
from phinetune.export.longrope import attention_factor, is_longrope, original_context, rope, trained_context
from phinetune.export.source import Checkpoint

ARCHITECTURE = gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.PHI3]
NAMED_PHI3 = re.compile(r"phi-?3", re.IGNORECASE)  # llama.cpp looks for phi-3 and phi3 in `general.name`

# A file's type by its name here: llama.cpp's number for it, and the type of its matrices.
FILE_TYPES = {
    "f32": (LlamaFileType.ALL_F32, GGMLQuantizationType.F32),
    "f16": (LlamaFileType.MOSTLY_F16, GGMLQuantizationType.F16),
    "bf16": (LlamaFileType.MOSTLY_BF16, GGMLQuantizationType.BF16),
    "q8_0": (LlamaFileType.MOSTLY_Q8_0, GGMLQuantizationType.Q8_0),
}
# numpy's dtype of what gguf makes of a tensor; of all other types it makes bytes.
NUMPY: dict[GGMLQuantizationType, np.dtype[Any]] = {
    GGMLQuantizationType.F32: np.dtype(np.float32),
    GGMLQuantizationType.F16: np.dtype(np.float16),
}


@dataclass(frozen=True)
class Written:
    """What a GGUF file holds.

    Attributes:
        tensors: how many.
        vocabulary: its tokenizer.
        context: tokens up to which its rotary embedding is the one the model was trained with.
    """

    tensors: int
    vocabulary: Vocabulary
    context: int


def write_gguf(source: Checkpoint, file: Path, kind: str, name: str) -> Written:
    """Write `source` to `file`; at most one tensor is in memory.

    Args:
        kind: f32, f16, bf16 or q8_0: the type of the matrices. Vectors are float32 in all of them.
        name: what `general.name` says.

    Raises:
        ModelError: a model, tokenizer or value that the file can't hold.
    """
    check_shape(source)
    vocabulary = read_vocabulary(source.tokenizer, source.generation_config, source.config.vocab_size)
    writer = gguf.GGUFWriter(file, ARCHITECTURE)
    try:
        plan = _plan(source, kind)
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
    return Written(len(plan), vocabulary, trained_context(source.config))


def check_shape(source: Checkpoint) -> None:
    """Make sure that llama.cpp's Phi-3 is this model.

    Raises:
        ModelError: it is not; all differences.
    """
    config, problems = source.config, []
    if config.hidden_act != "silu":
        problems.append(f"hidden_act is {config.hidden_act}, and llama.cpp's Phi-3 has silu alone")
    head = getattr(config, "head_dim", None)
    if head and head != config.hidden_size // config.num_attention_heads:
        problems.append(f"head_dim is {head}, and llama.cpp's Phi-3 divides hidden_size by num_attention_heads")
    if problems:
        raise ModelError([f"{source.base.path}: {problem}" for problem in problems])


def general_name(name: str, vocabulary: Vocabulary) -> str:
    """`name`, with phi-3 in it if llama.cpp must strip white space behind special tokens, and without it if not."""
    if vocabulary.strips:
        return name if NAMED_PHI3.search(name) else f"{name} (phi-3)"
    return NAMED_PHI3.sub("Phi 3", name)


def _rotary_dimensions(config: Phi3Config) -> int:
    part = rope(config).get("partial_rotary_factor", 1.0)
    return int(part * config.hidden_size) // int(config.num_attention_heads)


# -- keys ------------------------------------------------------------------------------------------------------


def _add_keys(writer: gguf.GGUFWriter, config: Phi3Config, kind: str, name: str) -> None:
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    total, shared, expert, count = writer.get_total_parameter_count()
    writer.add_size_label(gguf.size_label(total, shared, expert, count))
    writer.add_context_length(config.max_position_embeddings)
    writer.add_rope_scaling_orig_ctx_len(original_context(config))
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads or config.num_attention_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(_rotary_dimensions(config))
    writer.add_rope_freq_base(rope(config)["rope_theta"])
    if is_longrope(config):
        writer.add_rope_scaling_attn_factors(attention_factor(config))
    writer.add_file_type(FILE_TYPES[kind][0])
    writer.add_sliding_window(config.sliding_window or 0)  # 0 is how llama.cpp tells Phi-4 from the others
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


# -- tensors ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tensor:
    """One tensor of the file.

    Attributes:
        name: llama.cpp's.
        source: transformers' name, or the numbers themselves.
        shape: rows first, as in torch.
        type: the type it is stored in.
    """

    name: str
    source: str | NDArray[Any]
    shape: tuple[int, ...]
    type: GGMLQuantizationType


def tensor_names(config: Phi3Config) -> gguf.TensorNameMap:
    """llama.cpp's tensor names by transformers'."""
    return gguf.get_tensor_name_map(gguf.MODEL_ARCH.PHI3, config.num_hidden_layers)


def stored_type(name: str, shape: tuple[int, ...], kind: str) -> GGMLQuantizationType:
    """As llama.cpp's converter decides: vectors and norms in float32; rows that don't fill q8_0's blocks in float16."""
    wanted = FILE_TYPES[kind][1]
    if len(shape) < 2 or name.endswith("_norm.weight"):
        return GGMLQuantizationType.F32
    block, _ = gguf.GGML_QUANT_SIZES[wanted]
    return wanted if shape[-1] % block == 0 else GGMLQuantizationType.F16


def _plan(source: Checkpoint, kind: str) -> list[Tensor]:
    """All tensors of the file in their order."""
    names = tensor_names(source.config)
    plan = []
    if is_longrope(source.config):
        for key, tensor in (
            ("long_factor", gguf.MODEL_TENSOR.ROPE_FACTORS_LONG),
            ("short_factor", gguf.MODEL_TENSOR.ROPE_FACTORS_SHORT),
        ):
            factors = np.array(rope(source.config)[key], dtype=np.float32)
            name = f"{gguf.TENSOR_NAMES[tensor]}.weight"
            plan.append(Tensor(name, factors, factors.shape, GGMLQuantizationType.F32))
    for theirs in source.names():
        ours = names.get_name(theirs, try_suffixes=(".weight",))
        if ours is None:
            raise ModelError(f"{source.base.path}: llama.cpp's Phi-3 has no tensor for {theirs}")
        shape = source.shape_of(theirs)
        plan.append(Tensor(ours, theirs, shape, stored_type(ours, shape, kind)))
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
    numbers = tensor.source if isinstance(tensor.source, np.ndarray) else as_array(source.tensor(tensor.source))
    return stored(numbers, tensor.type, tensor.name)


def stored(numbers: NDArray[Any], kind: GGMLQuantizationType, name: str) -> NDArray[Any]:
    """float32 numbers in the type of the file, by gguf's own rounding.

    Raises:
        ModelError: a number too large for float16.
    """
    with np.errstate(over="ignore"):
        data: NDArray[Any] = gguf.quantize(numbers, kind)
    if kind == GGMLQuantizationType.F16 and not np.isfinite(data).all():
        raise ModelError(f"{name}: it holds values that are too large for float16; export with --type bf16")
    return data


def as_array(tensor: torch.Tensor) -> NDArray[Any]:
    """A tensor's numbers in float32."""
    return tensor.detach().float().contiguous().numpy()
