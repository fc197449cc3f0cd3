"""Llama, Mistral and Qwen2 in llama.cpp, whole and with the adapter as a file of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from exporting.gguf.gguf_helpers import (
    SPLIT_SHAPES,
    chat_ids,
    greedy,
    keys_of,
    llama,
    random_adapter,
    split_model,
    tensors_of,
)
from phinetune.errors import ModelError
from phinetune.exporting.targets import export

LETTER = 3 + ord("a")  # its id in the byte tokenizer
QUESTION = [{"role": "user", "content": "How many are 2 and 2?"}]


@pytest.mark.parametrize("shape", SPLIT_SHAPES.values(), ids=SPLIT_SHAPES)
def test_llama_cpp_answers_as_transformers_does(shape: str, tmp_path: Path) -> None:
    model, tokenizer = split_model(shape, tmp_path / "m")
    tuned = random_adapter(model, tmp_path / "adapter", str(tmp_path / "m"), size=0.3)
    ids = chat_ids(tokenizer, QUESTION)
    export(str(tmp_path / "m"), "gguf", kind="f32", out=tmp_path / "base.gguf")
    export(str(tmp_path / "adapter"), "gguf", kind="f32", out=tmp_path / "tuned.gguf")
    export(str(tmp_path / "adapter"), "gguf-lora", kind="f32", out=tmp_path / "lora.gguf")
    with torch.no_grad():
        wanted = torch.log_softmax(tuned(input_ids=torch.tensor([ids])).logits[0, -1], -1).tolist()
    answer = greedy(tuned, ids, 20)
    with tuned.disable_adapter():
        assert greedy(tuned, ids, 20) != answer
    for file, lora in (("tuned.gguf", None), ("base.gguf", tmp_path / "lora.gguf")):
        with llama(tmp_path / file, lora) as server:
            ours = server.log_probabilities(ids, LETTER)
            assert max(abs(ours[i] - wanted[i]) for i in ours) < 1e-3, file
            assert server.greedy(ids, 20) == answer, file


def test_the_architecture_and_its_tensors_are_the_bases_own(tmp_path: Path) -> None:
    for shape, name in (("llama 3", "llama"), ("mistral", "llama"), ("qwen2", "qwen2")):
        model, _ = split_model(SPLIT_SHAPES[shape], tmp_path / shape)
        export(str(tmp_path / shape), "gguf", kind="q8_0", out=tmp_path / f"{shape}.gguf")
        keys, tensors = keys_of(tmp_path / f"{shape}.gguf"), tensors_of(tmp_path / f"{shape}.gguf")
        assert keys["general.architecture"] == name
        assert keys[f"{name}.attention.head_count_kv"] == 2
        assert ("blk.0.attn_q.bias" in tensors) is (name == "qwen2")
        assert ("rope_freqs.weight" in tensors) is (shape == "llama 3")
        assert len(tensors) == len(list(model.named_parameters())) + (shape == "llama 3")
        assert tensors["blk.1.ffn_gate.weight"].tensor_type.name == "Q8_0"


def test_what_llama_cpp_computes_in_another_way_is_told(tmp_path: Path) -> None:
    split_model("model_type: mistral, kv_heads: 2, sliding_window: 100", tmp_path / "m")
    made = export(str(tmp_path / "m"), "gguf", out=tmp_path / "m.gguf")
    assert any("llama.cpp's Llama has no sliding window" in note and "100 tokens" in note for note in made.notes)
    assert "-c 100" in made.commands[0]
    rope = "rope_parameters: {rope_type: linear, rope_theta: 10000.0, factor: 2.0}"
    split_model(f"model_type: llama, {rope}", tmp_path / "linear")
    window = "use_sliding_window: true, sliding_window: 100, max_window_layers: 0"
    split_model(f"model_type: qwen2, {window}", tmp_path / "window")
    for folder, words in (("linear", "rope type linear is not exported"), ("window", "qwen2 has no sliding window")):
        with pytest.raises(ModelError, match=words):
            export(str(tmp_path / folder), "gguf", out=tmp_path / "refused.gguf")
