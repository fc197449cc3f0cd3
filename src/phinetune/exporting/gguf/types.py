"""The types of a GGUF's tensors: one for all matrices, or llama.cpp's mix for the types that its quantiser makes.

Sources: convert_hf_to_gguf.py (f32 to q8_0) and src/llama-quant.cpp (the others) of llama.cpp, as of autumn 2026.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import gguf
from gguf import GGMLQuantizationType as Type
from gguf import LlamaFileType

# llama.cpp's number for a file's type, and the type of most of the file's matrices, by the type's name in phinetune.
FILE_TYPES = {
    "f32": (LlamaFileType.ALL_F32, Type.F32),
    "f16": (LlamaFileType.MOSTLY_F16, Type.F16),
    "bf16": (LlamaFileType.MOSTLY_BF16, Type.BF16),
    "q8_0": (LlamaFileType.MOSTLY_Q8_0, Type.Q8_0),
    "q6_k": (LlamaFileType.MOSTLY_Q6_K, Type.Q6_K),
    "q5_k_m": (LlamaFileType.MOSTLY_Q5_K_M, Type.Q5_K),
    "q4_k_m": (LlamaFileType.MOSTLY_Q4_K_M, Type.Q4_K),
    "q4_0": (LlamaFileType.MOSTLY_Q4_0, Type.Q4_0),
}
PLAIN = ("f32", "f16", "bf16", "q8_0")  # one type for all matrices, as llama.cpp's converter writes them
MIXED = tuple(kind for kind in FILE_TYPES if kind not in PLAIN)  # what llama.cpp's quantiser makes of these
MORE_BITS = ("q5_k_m", "q4_k_m")  # "m": some tensors of some layers are q6_k
# The type for a matrix whose rows don't fill the blocks of 256 numbers.
SMALLER_BLOCKS = {Type.Q4_K: Type.Q5_0, Type.Q5_K: Type.Q5_1, Type.Q6_K: Type.Q8_0}
EMBEDDING, OUTPUT = "token_embd.weight", "output.weight"
SENSITIVE = re.compile(r"blk\.(\d+)\.(?:attn_v|attn_qkv|ffn_down)\.weight")


@dataclass(frozen=True)
class TypeChoice:
    """How the types of a file's tensors are chosen.

    Attributes:
        kind: a key of `FILE_TYPES`.
        layers: decoder layers of the model.
        tied: whether the output head is the embedding, so that no tensor `output.weight` is in the file.
    """

    kind: str
    layers: int = 0
    tied: bool = False

    def of(self, name: str, shape: tuple[int, ...]) -> Type:
        """The type in which the tensor llama.cpp calls `name`, of `shape` (rows first), is stored.

        Vectors and norms are float32. A matrix whose rows fill no block of the type is float16.
        """
        if len(shape) < 2 or name.endswith("_norm.weight"):
            return Type.F32
        wanted = FILE_TYPES[self.kind][1]
        if self.kind not in PLAIN:
            wanted = self._mixed(name, wanted)
        return _that_fits(wanted, shape[-1])

    def _mixed(self, name: str, usual: Type) -> Type:
        if name == OUTPUT or (self.tied and name == EMBEDDING):
            return Type.Q6_K
        sensitive = SENSITIVE.fullmatch(name)
        if self.kind in MORE_BITS and sensitive and _more_bits(int(sensitive[1]), self.layers):
            return Type.Q6_K
        return usual


def _more_bits(layer: int, layers: int) -> bool:
    """Whether a layer's sensitive tensors get more bits: the first and last eighth, and each third between."""
    eighth = layers // 8
    return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2


def _that_fits(wanted: Type, columns: int) -> Type:
    for kind in (wanted, SMALLER_BLOCKS.get(wanted, wanted)):
        if columns % gguf.GGML_QUANT_SIZES[kind][0] == 0:
            return kind
    return Type.F16
