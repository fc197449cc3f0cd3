"""Keywords that scripts give to `from_pretrained`, transformers' or Unsloth's: what becomes of each in `model`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

logger = logging.getLogger(__name__)

DTYPES = {"bf16": "bfloat16", "fp32": "float32", "fp16": "float16"}
OTHER_NAMES = {
    "model_name": "path",
    "model_name_or_path": "path",
    "pretrained_model_name_or_path": "path",
    "torch_dtype": "dtype",
    "_attn_implementation": "attn_implementation",
}
# What they would do is done in another way, or is not needed. A line says so unless the value asks for nothing.
WHOLE = "the model is on model.device as a whole"
OWN = "answers come from phinetune's own decoder"
NOT_USED: Mapping[str, str] = {
    "trust_remote_code": "only transformers' own classes are used",
    "low_cpu_mem_usage": "weights are always read one by one",
    "cache_dir": "HF_HOME names the folder of downloads",
    "offload_folder": WHOLE,
    "offload_state_dict": WHOLE,
    "offload_buffers": WHOLE,
    "offload_embedding": WHOLE,
    "max_memory": WHOLE,
    "load_in_16bit": "model.dtype names the dtype",
    "float32_mixed_precision": "adapters always train in float32",
    "fix_tokenizer": "the tokenizer is used as it is",
    "use_exact_model_name": "model.path is always taken as it is",
    "fast_inference": OWN,
    "gpu_memory_utilization": OWN,
    "float8_kv_cache": OWN,
    "max_lora_rank": OWN,
    "disable_log_stats": OWN,
    "unsloth_tiled_mlp": "engine.activation_memory saves memory",
}
# What can't be had, with the values that ask for nothing, and the way to the same end.
REFUSED: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "full_finetuning": ((None, False), "a run trains an adapter; all weights at once are not trained here"),
    "load_in_fp8": ((None, False), "take quantization: nf4 or int8"),
    "qat_scheme": ((None,), "take quantization: nf4 or int8"),
    "rope_scaling": ((None,), "write it into the checkpoint's config.json"),
    "resize_model_vocab": ((None,), "tokens are never added"),
    "use_safetensors": ((None, True), "weights are read from safetensors files only"),
    "local_files_only": ((None, False), "set the environment variable HF_HUB_OFFLINE=1"),
    "force_download": ((None, False), "delete the repository from the hub's cache instead"),
    "proxies": ((None,), "set the environment variable HTTPS_PROXY"),
    "subfolder": ((None, ""), "give the folder itself as model.path"),
    "variant": ((None,), "only model.safetensors and its index are read"),
    "gguf_file": ((None,), "convert the file to a checkpoint of transformers first"),
}
TOKENS = ("token", "use_auth_token")  # their values are never shown or kept


def translate_keywords(given: Mapping[str, Any]) -> dict[str, Any]:
    """The section `model` with phinetune's own keys alone. A line in the log tells of each keyword that is not used.

    Raises:
        ValueError: a keyword asks for what can't be had, or two of them ask for different things.
    """
    section = dict(given)
    for key in ("dtype", "torch_dtype"):
        if key in section:
            section[key] = _dtype(section[key])
    for key, name in OTHER_NAMES.items():
        if key in section:
            _set(section, name, section.pop(key), key)
    problems = [_refusal(key, section.pop(key), *REFUSED[key]) for key in list(section) if key in REFUSED]
    problems += [_token(key, section.pop(key)) for key in TOKENS if key in section]
    if any(problems):
        raise ValueError("; ".join(filter(None, problems)))
    for key in [key for key in section if key in NOT_USED]:
        if section.pop(key) not in (None, False):
            logger.warning("model.%s has no effect: %s", key, NOT_USED[key])
    for key, translate in TRANSLATED.items():
        if key in section:
            translate(section, section.pop(key))
    if section.get("dtype", "auto") is None:
        del section["dtype"]
    return section


def _dtype(value: Any) -> str | None:
    """A dtype by its long name; None if the value asks for nothing."""
    name = str(value).removeprefix("torch.")
    return None if name == "None" else DTYPES.get(name, name)


def _set(section: dict[str, Any], key: str, value: Any, by: str) -> None:
    """Set a key of the section as the keyword `by` asks. A key that is written with its default asks for nothing."""
    if section.get(key) not in (None, "auto", "none", value):
        raise ValueError(f"`{by}: {value}` and `{key}: {section[key]}` don't go together; keep `{key}`")
    section[key] = value


def _refusal(key: str, value: Any, asks_nothing: tuple[Any, ...], instead: str) -> str | None:
    return None if value in asks_nothing else f"`{key}` is not used here: {instead}"


def _token(key: str, value: Any) -> str | None:
    if value in (None, True, False):
        return None
    return f"`{key}` is not kept in a configuration; set the environment variable HF_TOKEN"


def _device_map(section: dict[str, Any], value: Any) -> None:
    """A map that puts the whole model onto one device names the device; one that spreads it is not used."""
    if isinstance(value, Mapping) and list(value) == [""]:
        value = value[""]
    if isinstance(value, int):
        value = f"cuda:{value}"
    if isinstance(value, Mapping):
        raise ValueError(f"`device_map` is not used here: {WHOLE}")
    if value in ("auto", "sequential", "balanced", "balanced_low_0"):
        logger.warning("model.device_map has no effect: %s", WHOLE)
    elif value is not None:
        _set(section, "device", str(value), "device_map")


def _flash_attention(section: dict[str, Any], value: Any) -> None:
    if value:
        _set(section, "attn_implementation", "flash_attention_2", "use_flash_attention_2")


def _quantization(kind: str, by: str) -> Callable[[dict[str, Any], Any], None]:
    def translate(section: dict[str, Any], value: Any) -> None:
        if value:
            _set(section, "quantization", kind, by)
            logger.warning("model.%s is taken as model.quantization: %s", by, kind)

    return translate


def _bitsandbytes(section: dict[str, Any], value: Any) -> None:
    """transformers' `quantization_config`, as a dictionary or as an object."""
    if value is None:
        return
    tree = value if isinstance(value, Mapping) else value.to_dict() if hasattr(value, "to_dict") else {}
    bits = {key: True for key in ("load_in_4bit", "load_in_8bit") if tree.get(key)}
    if len(bits) != 1:
        raise ValueError("`quantization_config`: it should have `load_in_4bit: true` or `load_in_8bit: true`")
    TRANSLATED[next(iter(bits))](section, True)
    dtype = _dtype(tree.get("bnb_4bit_compute_dtype") or None)
    if "load_in_4bit" in bits and dtype and section.get("dtype") in (None, "auto"):
        section["dtype"] = dtype
    elif "load_in_4bit" in bits and dtype and section["dtype"] != dtype:
        logger.warning("model.quantization_config: products are computed in model.dtype, not in %s", dtype)
    own = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    unlike = [key for key, kept in own.items() if "load_in_4bit" in bits and tree.get(key, kept) != kept]
    unlike += [key for key in tree if key.startswith("llm_int8_") and tree[key] not in (None, False, 6.0)]
    for key in unlike:
        logger.warning("model.quantization_config: `%s: %s` is not used; see model.quantization", key, tree[key])


TRANSLATED: Mapping[str, Callable[[dict[str, Any], Any], None]] = {
    "device_map": _device_map,
    "use_flash_attention_2": _flash_attention,
    "load_in_4bit": _quantization("nf4", "load_in_4bit"),
    "load_in_8bit": _quantization("int8", "load_in_8bit"),
    "quantization_config": _bitsandbytes,
}

# Keywords of Unsloth's `FastLanguageModel.from_pretrained` that are settings of the training, and their keys there.
OF_TRAINING: Mapping[str, str] = {
    "max_seq_length": "max_length",
    "random_state": "seed",
    "use_gradient_checkpointing": "gradient_checkpointing",
}

# Keywords that say where the answers of texts begin, and the keys of `data` for them: those of TRL's collator for
# completions, and of Unsloth's `train_on_responses_only`.
OF_DATA: Mapping[str, str] = {
    "response_template": "response",
    "response_part": "response",
    "instruction_template": "instruction",
    "instruction_part": "instruction",
}


# Keys of SFTConfig that say on which tokens the loss falls, which is `data.loss_on` here.
OF_LOSS: Mapping[str, str] = {
    "assistant_only_loss": "taken as data.loss_on: assistant where it is true; false is TRL's default, and a line says "
    "that data.loss_on: all asks for every token",
    "completion_only_loss": "taken as data.loss_on: assistant where it is true, and as all where it is false",
}
INIT = "model_init_kwargs"  # SFTConfig's keywords for `from_pretrained`


def move_losses(training: Mapping[str, Any], data: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Both sections, with TRL's two switches of the loss as `data.loss_on`.

    Raises:
        ValueError: they ask for the answers alone, and `data.loss_on` for every token.
    """
    kept, moved = dict(training), dict(data)
    given = {key: kept.pop(key) for key in OF_LOSS if key in kept}
    asked = {key: str(value).lower() for key, value in given.items() if value is not None}
    answers = [key for key, value in asked.items() if value == "true"]
    everything = asked.get("completion_only_loss") == "false" and not answers
    own = moved.get("loss_on")
    if answers and own == "all":
        raise ValueError(f"training_config.{answers[0]} is true, and data.loss_on is all; keep one of them")
    for key, value in asked.items():
        if value not in ("true", "false"):
            raise ValueError(f"training_config.{key}: it should be true or false (given: {given[key]!r})")
        logger.warning("training_config.%s: %s", key, _loss_told(value, everything, own))
    if everything and own is None:
        moved["loss_on"] = "all"
    return kept, moved


def _loss_told(value: str, everything: bool, own: str | None) -> str:
    """What becomes of one of the two switches, for the log."""
    if own is not None:
        return f"no effect, data.loss_on: {own} says where the loss falls"
    if everything:
        return "taken as data.loss_on: all, every token is trained on"
    if value == "true":
        return "taken as data.loss_on: assistant, the answers are trained on"
    return "no effect, the answers are trained on; data.loss_on: all trains on every token"


def move_to_model(training: Mapping[str, Any], model: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Both sections, with the keywords of `model_init_kwargs` as keys of `model`. What `model` says itself is kept.

    Raises:
        ValueError: it is no dictionary.
    """
    kept, moved = dict(training), dict(model)
    keywords = kept.pop(INIT, None) or {}
    if not isinstance(keywords, Mapping):
        raise ValueError(f"training_config.{INIT}: it should be a dictionary (given: {keywords!r})")
    for key, value in keywords.items():
        name = OTHER_NAMES.get(str(key), str(key))
        if name in moved or key in moved:
            logger.warning("training_config.%s: %s has no effect: model.%s says it", INIT, key, name)
        else:
            moved[name] = value
            logger.warning("training_config.%s: %s is taken as model.%s", INIT, key, name)
    return kept, moved


def move_to_data(training: Mapping[str, Any], data: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Both sections, with the keywords of `training` that say where answers begin as keys of `data`. What `data` says
    itself is kept.

    Raises:
        ValueError: token ids stand there, which only one tokenizer can read.
    """
    kept, moved = dict(training), dict(data)
    for key, name in OF_DATA.items():
        value = kept.pop(key, None)
        if value is None:
            continue
        if not isinstance(value, str):
            raise ValueError(f"training_config: `{key}: {value}` is no text; write it as a text in data.{name}")
        if moved.get(name) is not None:
            logger.warning("training_config.%s has no effect: data.%s says it", key, name)
        else:
            moved[name] = value
            logger.warning("training_config.%s is taken as data.%s", key, name)
    return kept, moved


def move_to_training(model: Mapping[str, Any], training: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Both sections, with the keywords of `model` that are settings of the training where they belong. What the
    training says itself is kept.
    """
    kept, moved = dict(model), dict(training)
    for key, name in OF_TRAINING.items():
        value = kept.pop(key, None)
        if value is None:
            continue
        older = {"max_length": "max_seq_length"}.get(name, name)
        if name in moved or older in moved:
            logger.warning("model.%s has no effect: training_config.%s says it", key, name if name in moved else older)
        else:
            moved[name] = bool(value) if name == "gradient_checkpointing" else value
            logger.warning("model.%s is taken as training_config.%s", key, name)
    return kept, moved
