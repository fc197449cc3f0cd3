"""`random:SHAPE` models: random weights of a true Phi-3 shape and a byte-level tokenizer, for tests and benchmarks.

`random:phi-3-mini` has the shape of Phi-3 mini. `random:{layers: 4}` is the same with 4 layers, and
`random:phi-4{layers: 2}` is the preset `phi-4` with 2 layers. Every key of `transformers.Phi3Config` can be given.
`random:{model_type: llama}` is a Llama; there the keys are those of `LlamaConfig`, and its defaults.
"""

from __future__ import annotations

from typing import Any

import torch
import yaml
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast

from phinetune.config.yaml_text import read_yaml
from phinetune.engine.families import CONFIGS, ModelConfig, transformers_class
from phinetune.errors import ConfigError, ModelError, unknown_key

PREFIX = "random:"

# Sizes as in the config.json of the hub's checkpoints.
PRESETS: dict[str, dict[str, Any]] = {
    "phi-3-mini": {"sliding_window": 2047},
    "phi-3-medium": {
        "hidden_size": 5120,
        "intermediate_size": 17920,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "num_key_value_heads": 10,
        "sliding_window": 2047,
    },
    "phi-4": {
        "hidden_size": 5120,
        "intermediate_size": 17920,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "num_key_value_heads": 10,
        "vocab_size": 100352,
        "max_position_embeddings": 16384,
        "original_max_position_embeddings": 16384,
        "rope_parameters": {"rope_type": "default", "rope_theta": 250000.0},
    },
}
SHORT_NAMES = {
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "hidden": "hidden_size",
    "intermediate": "intermediate_size",
    "vocab": "vocab_size",
}

# Phi-3's special tokens and their ids. As in Phi-3, a special token includes the white space to its right.
SPECIAL = {
    "<|endoftext|>": 32000,
    "<|assistant|>": 32001,
    "<|system|>": 32006,
    "<|end|>": 32007,
    "<|user|>": 32010,
}
FIRST_BYTE = 3  # <unk>, <s> and </s> come before the 256 bytes, as in Phi-3's vocabulary
DEFAULT_VOCABULARY = 32064
SMALLEST_VOCABULARY = FIRST_BYTE + 256 + len(SPECIAL)

# Renders the same text as Phi-3.5's template (the tests compare them).
CHAT_TEMPLATE = (
    "{% for m in messages %}"
    "{% if m['role'] in ['user', 'assistant'] or m['role'] == 'system' and m['content'] %}"
    "{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}"
    "{% endif %}{% endfor %}"
    "{{ '<|assistant|>\n' if add_generation_prompt else eos_token }}"
)


def parse_shape(path: str) -> ModelConfig:
    """The model configuration that `random:SHAPE` describes.

    Raises:
        ModelError: the preset or a key is unknown, a key is given twice, or the sizes don't fit together.
    """
    name, brace, rest = path.removeprefix(PREFIX).strip().partition("{")
    if name and name not in PRESETS:
        raise ModelError(f"model.path: {path}: unknown shape `{name}`; known: {', '.join(PRESETS)}")
    try:
        given = read_yaml("{" + rest, f"model.path: {path}", lines=False) if brace else {}
    except ConfigError as error:
        raise ModelError(error.problems) from None
    except yaml.YAMLError:
        raise ModelError(f"model.path: {path}: write it as random:{{layers: 4, hidden_size: 64}}") from None
    if both := [f"`{short}` and `{long}`" for short, long in SHORT_NAMES.items() if {short, long} <= given.keys()]:
        raise ModelError(f"model.path: {path}: {', '.join(both)} are the same; keep one of them")
    given = {SHORT_NAMES.get(key, key): value for key, value in given.items()}
    family = given.pop("model_type", "phi3")
    if family not in CONFIGS or (name and family != "phi3"):
        raise ModelError(f"model.path: {path}: model_type must be {', '.join(CONFIGS)}, and phi3 for a named shape")
    known = CONFIGS[family]().to_dict()
    problems = [unknown_key(f"model.path: {path}", key, [*known, *SHORT_NAMES]) for key in given if key not in known]
    if problems:
        raise ModelError(problems)
    sizes = {**(PRESETS[name or "phi-3-mini"] if family == "phi3" else {}), **given}
    if "num_attention_heads" in given and "num_key_value_heads" not in given:
        sizes["num_key_value_heads"] = given["num_attention_heads"]
    return _checked_config(path, CONFIGS[family], {"vocab_size": DEFAULT_VOCABULARY, **sizes})


def _checked_config(path: str, kind: type[ModelConfig], sizes: dict[str, Any]) -> ModelConfig:
    vocabulary = sizes["vocab_size"]
    if vocabulary < SMALLEST_VOCABULARY:
        raise ModelError(f"model.path: {path}: vocab_size must be {SMALLEST_VOCABULARY} or more, not {vocabulary}")
    special = special_ids(vocabulary)
    try:
        config = kind(**{"eos_token_id": special["<|endoftext|>"], "pad_token_id": special["<|endoftext|>"], **sizes})
    except Exception as error:  # transformers' strict dataclasses raise error types of their own
        raise ModelError(f"model.path: {path}: {error}") from error
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads or config.num_attention_heads
    if config.hidden_size % heads or heads % kv_heads:
        raise ModelError(
            f"model.path: {path}: hidden_size {config.hidden_size} must be a multiple of num_attention_heads "
            f"{heads}, and that of num_key_value_heads {kv_heads}"
        )
    return config


def special_ids(vocabulary: int) -> dict[str, int]:
    """The ids of the special tokens: Phi-3's own, or the ids right after the bytes if the vocabulary is smaller."""
    if vocabulary > max(SPECIAL.values()):
        return dict(SPECIAL)
    return {token: FIRST_BYTE + 256 + i for i, token in enumerate(SPECIAL)}


def random_model(
    config: ModelConfig,
    seed: int,
    dtype: torch.dtype,
    attention: str,
    kind: type[PreTrainedModel] | None = None,
) -> PreTrainedModel:
    """A model of this shape with weights drawn from `seed`. The global random generator keeps its state.

    Args:
        attention: transformers' `attn_implementation`.
        kind: the class of the model; None is transformers' own.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = kind or transformers_class(config)
        model: PreTrainedModel = made._from_config(config, dtype=dtype, attn_implementation=attention)
    special = special_ids(config.vocab_size)
    model.generation_config = GenerationConfig(
        bos_token_id=1,
        eos_token_id=[special["<|endoftext|>"], special["<|assistant|>"], special["<|end|>"]],
        pad_token_id=config.pad_token_id,
    )
    model.eval()
    return model


def byte_tokenizer(vocabulary: int = DEFAULT_VOCABULARY) -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are bytes, with Phi-3's special tokens and chat template.

    Args:
        vocabulary: the model's `vocab_size`, on which the ids of the special tokens depend.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    special = special_ids(vocabulary)
    letters = {letter: FIRST_BYTE + byte for byte, letter in bytes_to_unicode().items()}
    core = Tokenizer(models.BPE({"<unk>": 0, "<s>": 1, "</s>": 2, **letters, **special}, [], unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(token, rstrip=True, special=True) for token in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="<|endoftext|>",
        unk_token="<unk>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=4096,
    )
