"""llama.cpp as a client that runs exported files, and small models to export."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Phi3ForCausalLM, PreTrainedTokenizerBase

from helpers import SHARED
from phinetune.checkpoints.load import read_config
from phinetune.checkpoints.random_shapes import byte_tokenizer, parse_shape, special_ids
from phinetune.engine.families import transformers_class

# Sizes for the hub's configurations, as small as their rotary embeddings allow: they need 96 dimensions per head.
SHAPES: dict[str, dict[str, int]] = {
    "phi-3-mini-4k-instruct": {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 4},
    "phi-3.5-mini-instruct": {"hidden_size": 384, "num_attention_heads": 4, "num_key_value_heads": 4},
    "phi-4-mini-instruct": {"hidden_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2},
}

LLAMA3 = "{rope_type: llama3, rope_theta: 5000.0, factor: 8.0, low_freq_factor: 1.0, high_freq_factor: 4.0,"
LLAMA3 += " original_max_position_embeddings: 64}"
# Shapes whose q, k, v and gate, up are layers of their own.
SPLIT_SHAPES = {
    "llama": "model_type: llama, kv_heads: 4",
    "llama 3": f"model_type: llama, kv_heads: 2, head_dim: 32, tie_word_embeddings: true, rope_parameters: {LLAMA3}",
    "mistral": "model_type: mistral, kv_heads: 2, sliding_window: null, rms_norm_eps: 1.0e-5",
    "qwen2": "model_type: qwen2, kv_heads: 2",
}


class Llama:
    """llama.cpp's server on one file, on loopback: float32 throughout, no flash attention, no repacked weights."""

    def __init__(self, file: Path, lora: Path | None = None, context: int = 512) -> None:
        client = pytest.importorskip("xllamacpp")
        params = client.CommonParams()
        params.model.path = str(file)
        params.n_ctx, params.n_parallel, params.port = context, 1, 0
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = torch.get_num_threads()
        params.cache_type_k = params.cache_type_v = client.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = client.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.no_extra_bufts, params.warmup, params.n_gpu_layers, params.verbosity = True, False, 0, 0
        if lora:
            params.lora_adapters = [client.CommonAdapterLoraInfo(str(lora), 1.0)]
        self._server = client.Server(params)

    def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        request = urllib.request.Request(
            self._server.listening_address + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request) as answer:
            result: dict[str, Any] = json.load(answer)
        return result

    def tokenize(self, text: str, special: bool = True) -> list[int]:
        """The ids of a prompt: with the start token if the file says so; special tokens are found by their text."""
        body = {"content": text, "add_special": special, "parse_special": special}
        return list(self._post("/tokenize", body)["tokens"])

    def render(self, messages: Sequence[dict[str, str]]) -> str:
        """A chat rendered by the template in the file, with the header of the answer at its end."""
        return str(self._post("/apply-template", {"messages": list(messages)})["prompt"])

    def greedy(self, ids: Sequence[int], count: int, **more: Any) -> list[int]:
        """The next `count` tokens, or fewer if the answer ends; the end token is included."""
        body = {"prompt": list(ids), "n_predict": count, "temperature": 0, "return_tokens": True, **more}
        return list(self._post("/completion", {**body, "cache_prompt": False})["tokens"])

    def log_probabilities(self, ids: Sequence[int], sampled: int | None = None) -> dict[int, float]:
        """The log-probabilities of the 20 likeliest next tokens, by id.

        Args:
            sampled: the next token to force. llama.cpp returns the probabilities only if this token is text by itself.
        """
        body = {"prompt": list(ids), "n_predict": 1, "temperature": 0, "n_probs": 20, "cache_prompt": False}
        bias = {} if sampled is None else {"logit_bias": [[sampled, 1000]]}
        likeliest = self._post("/completion", {**body, **bias})["completion_probabilities"][0]["top_logprobs"]
        return {token["id"]: token["logprob"] for token in likeliest}


@contextmanager
def llama(file: Path, lora: Path | None = None, context: int = 512) -> Iterator[Llama]:
    """llama.cpp on `file`. The server stops when the block ends."""
    server = Llama(file, lora, context)
    try:
        yield server
    finally:
        del server


def greedy(model: Any, ids: Sequence[int], count: int) -> list[int]:
    """The next tokens in transformers."""
    config = model.generation_config
    with torch.no_grad():
        out = model.generate(
            input_ids=torch.tensor([list(ids)]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            max_new_tokens=count,
            do_sample=False,
            pad_token_id=config.pad_token_id,
        )
    return out[0, len(ids) :].tolist()


def chat_ids(tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, str]]) -> list[int]:
    """A chat's ids as phinetune trains on them, with the header of the answer at their end."""
    text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def hub_shape(name: str, folder: Path, **changes: Any) -> Path:
    """Write the hub's configuration `name` into `folder`: narrow, with two layers and a vocabulary of 300."""
    source = SHARED / "hub-configs" / f"{name}.json"
    if not source.is_file():
        pytest.skip(f"the hub's configurations are not at {source.parent}")
    tree = json.loads(source.read_text())
    small = {"num_hidden_layers": 2, "intermediate_size": 160, "vocab_size": 300}
    ids = {"bos_token_id": 1, "eos_token_id": 259, "pad_token_id": 259}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**tree, **SHAPES[name], **small, **ids, **changes}))
    return folder


def random_model(folder: Path, tokenizer: PreTrainedTokenizerBase, seed: int = 0) -> Phi3ForCausalLM:
    """A model with the configuration in `folder`, saved there with the tokenizer.

    Its weights are random, and larger than a new model's.
    """
    config = read_config(folder)
    torch.manual_seed(seed)
    model = Phi3ForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3) if parameter.dim() > 1 else parameter.add_(torch.randn_like(parameter), alpha=0.2)
    special = special_ids(config.vocab_size)
    model.generation_config.eos_token_id = [special[token] for token in ("<|endoftext|>", "<|assistant|>", "<|end|>")]
    text = (folder / "config.json").read_text()
    model.save_pretrained(folder)
    (folder / "config.json").write_text(text)  # as the hub has it
    tokenizer.save_pretrained(folder)
    return model


def split_model(shape: str, folder: Path) -> tuple[Any, PreTrainedTokenizerBase]:
    """A small model of random weights, larger than a new model's, saved in `folder`."""
    sizes = "layers: 2, hidden_size: 64, intermediate_size: 96, heads: 4, vocab: 300, max_position_embeddings: 512"
    config = parse_shape(f"random:{{{shape}, {sizes}}}")
    torch.manual_seed(0)
    model: Any = transformers_class(config)._from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5) if parameter.dim() > 1 else parameter.add_(torch.randn_like(parameter), alpha=0.2)
    special = special_ids(300)
    model.generation_config.eos_token_id = [special[token] for token in ("<|endoftext|>", "<|assistant|>", "<|end|>")]
    model.generation_config.pad_token_id = special["<|endoftext|>"]
    tokenizer = byte_tokenizer(300)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model, tokenizer


def random_adapter(model: Any, folder: Path, base: str, size: float = 0.05, **options: Any) -> Any:
    """`model` with an adapter of random A and B. It is saved in `folder` as an adapter of `base`."""
    torch.manual_seed(1)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **options}
    tuned = get_peft_model(model, LoraConfig(**settings, init_lora_weights=False))
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name or "lora_embedding_B" in name:
                parameter.mul_(size)
    tuned.peft_config["default"].base_model_name_or_path = base
    tuned.save_pretrained(str(folder), save_embedding_layers=False)
    return tuned.eval()


def tensors_of(file: Path) -> dict[str, Any]:
    """The tensors of a GGUF by name."""
    return {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}


def keys_of(file: Path) -> dict[str, Any]:
    """The keys of a GGUF."""
    return {name: field.contents() for name, field in gguf.GGUFReader(file).fields.items()}
