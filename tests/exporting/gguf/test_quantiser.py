"""Quantised files are those of llama.cpp's own quantiser: the same types, and numbers that llama.cpp reads back."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from exporting.gguf.gguf_helpers import keys_of, tensors_of
from helpers import TINY
from phinetune.errors import ModelError
from phinetune.exporting.gguf.quantiser import BY_GGML, quantised
from phinetune.exporting.gguf.types import MIXED, TypeChoice
from phinetune.exporting.targets import export

# What llama.cpp 0.5.0's quantiser (`llama_model_quantize`) made of f32 files of these shapes, by `benchmarks.quantise`.
MADE = json.loads((Path(__file__).parent / "llama_cpp_mix.json").read_text())


@pytest.mark.parametrize("kind", MIXED)
@pytest.mark.parametrize("shape", MADE)
def test_each_tensor_has_the_type_that_llama_cpp_gives_it(tmp_path: Path, shape: str, kind: str) -> None:
    file = tmp_path / "a.gguf"
    export(f"random:{shape}", "gguf", kind=kind, out=file)
    assert {name: one.tensor_type.name for name, one in tensors_of(file).items()} == MADE[shape][kind]
    assert keys_of(file)["general.file_type"] == {"q4_0": 2, "q4_k_m": 15, "q5_k_m": 17, "q6_k": 18}[kind]


def test_layers_of_more_bits_are_the_first_and_last_eighth_and_each_third_between() -> None:
    choice = TypeChoice("q4_k_m", layers=32)
    more = [i for i in range(32) if choice.of(f"blk.{i}.ffn_down.weight", (3072, 8192)) == Type.Q6_K]
    assert more == [0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31]


@pytest.mark.parametrize("kind", BY_GGML, ids=lambda kind: kind.name)
@pytest.mark.parametrize("shape", [(1, 256), (5, 768), (3, 7, 512)], ids=str)
def test_numbers_come_back_within_the_types_step(kind: Type, shape: tuple[int, ...]) -> None:
    numbers = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    data = quantised(numbers, kind, "a")
    assert data.shape == gguf.quant_shape_to_byte_shape(shape, kind)
    back = gguf.dequantize(data, kind)
    error = float(np.sqrt(np.mean((back - numbers) ** 2)))
    bits = {Type.Q4_K: 4, Type.Q5_K: 5, Type.Q6_K: 6}[kind]
    assert error < 2.4 / 2**bits / 2  # the step of 16 to 64 levels over some ±2.4 standard deviations


def test_rows_are_quantised_apart_however_they_are_shared_out(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = np.random.default_rng(1).standard_normal((7, 256)).astype(np.float32)
    whole = quantised(numbers, Type.Q4_K, "a")
    alone = np.concatenate([quantised(numbers[i : i + 1], Type.Q4_K, "a") for i in range(7)])
    assert whole.tobytes() == alone.tobytes()


@pytest.mark.parametrize("kind", [Type.Q8_0, Type.Q4_K, Type.Q5_0], ids=lambda kind: kind.name)
def test_a_number_that_is_not_finite_is_refused(kind: Type) -> None:
    numbers = np.zeros((1, 256), dtype=np.float32)
    numbers[0, 3] = np.inf
    with pytest.raises(ModelError, match=r"blk\.0\.x: it holds values that are not finite"):
        quantised(numbers, kind, "blk.0.x")


def test_without_the_quantiser_the_type_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from phinetune.exporting.gguf import quantiser

    monkeypatch.setattr(quantiser, "find_spec", lambda name: None)
    quantiser._ggml.cache_clear()
    try:
        with pytest.raises(ModelError, match=r"pip install 'phinetune\[llamacpp\]'"):
            export(
                "random:{layers: 1, hidden_size: 256, intermediate_size: 256, heads: 4, vocab: 300}",
                "gguf",
                kind="q4_k_m",
                out=tmp_path / "a.gguf",
            )
        assert not list(tmp_path.iterdir())
    finally:
        quantiser._ggml.cache_clear()


def test_the_tiny_model_whose_rows_fill_no_block_of_256_is_written_in_smaller_blocks(tmp_path: Path) -> None:
    export(TINY, "gguf", kind="q4_k_m", out=tmp_path / "a.gguf")
    types = {one.tensor_type.name for one in tensors_of(tmp_path / "a.gguf").values()}
    assert types <= {"F32", "F16", "Q5_0", "Q8_0"}
