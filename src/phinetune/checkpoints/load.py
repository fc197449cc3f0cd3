"""Loads a checkpoint of the Phi-3 family and its tokenizer. Code that comes with a checkpoint is never run."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, GenerationConfig, Phi3Config, PreTrainedModel, PreTrainedTokenizerBase

from phinetune.chats.template import stop_ids
from phinetune.checkpoints import random_shapes, starter
from phinetune.checkpoints.adapter_values import MOST_LAYERS
from phinetune.checkpoints.answer_weights import check_q8, how_held, lay, read_dtype
from phinetune.checkpoints.device import pick_device, pick_dtype
from phinetune.checkpoints.model_types import config_class
from phinetune.checkpoints.prequantized import as_it_is, held_as, own_form
from phinetune.checkpoints.quantize import cast_others, keep_packing, kind_of, quantization_config, scales_of
from phinetune.checkpoints.small_files import read_json
from phinetune.checkpoints.tokenizer_files import check_template, check_tokenizer_files, check_vocabulary
from phinetune.checkpoints.weight_files import fingerprint, lazy_tensors
from phinetune.checkpoints.whole import check_numbers, check_whole
from phinetune.config.answer_weights import Q8
from phinetune.config.model import ModelSection
from phinetune.engine.choice import model_class
from phinetune.engine.families import ModelConfig
from phinetune.engine.phi3 import missing_form
from phinetune.errors import ModelError, first_line, reason_of, told_as

logger = logging.getLogger(__name__)

GENERATION = "generation_config.json"
TOKENIZER = "tokenizer.json"
SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "max_position_embeddings", "original_max_position_embeddings", "sliding_window"),
)
HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]


@dataclass(frozen=True)
class Base:
    """Which weights an adapter belongs to.

    Attributes:
        path: a hub id, `starter` or `random:…` as the user gave it; a folder by its absolute path, so that it is found
            from everywhere.
        revision: the commit of a hub id, else None.
        fingerprint: SHA-256 that tells this base from others; see the function `fingerprint`. For a `random:` model it
            covers the configuration and the seed.
        seed: the seed of a `random:` model's weights, else None.
    """

    path: str
    revision: str | None
    fingerprint: str
    seed: int | None = None

    def to_json(self, started_from: Mapping[str, str] | None = None) -> str:
        """The record beside an adapter.

        Args:
            started_from: the adapter that training went on from, and its digest; None for one that began anew.
        """
        tree = asdict(self) | ({"started_from": dict(started_from)} if started_from else {})
        return json.dumps(tree, indent=2) + "\n"


@dataclass
class Loaded:
    """A model that is ready to run, its tokenizer, which base it is, and its device."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    base: Base
    device: torch.device


def load_base(
    section: ModelSection,
    *,
    fast: bool = True,
    tokenizer: PreTrainedTokenizerBase | None = None,
    weights: str | None = None,
) -> Loaded:
    """Load the model that `section` names and move it to its device. The model is in evaluation mode.

    Args:
        fast: load it as the class of `phinetune.engine.phi3`, which takes packed rows too, if that class supports this
            model's configuration.
        tokenizer: its tokenizer, if `open_tokenizer` has loaded it already.
        weights: None for a model that may also be trained or merged. Else it only answers: `auto` lets the weights of
            linear layers lie in bfloat16 if the files are in it and products in float32 (`engine.half_linear`); `q8_0`
            rounds them to eight bits (`engine.q8_linear`).

    Raises:
        ConfigError: the weights can't lie so.
        ModelError: the model can't be found or is of another family; its files are damaged, its weights are pickled,
            not whole (`check_whole`) or not finite; or its tokenizer has no chat template that works, or more ids than
            the model.
    """
    device = pick_device(section.device)
    dtype = pick_dtype(section.dtype, device)
    if section.path.startswith(random_shapes.PREFIX):
        model, base = _load_random(section, dtype, fast, device, weights)
        tokenizer = tokenizer or load_tokenizer(section, base, random_shapes.parse_shape(section.path))
    else:
        model, base, tokenizer = _load_checkpoint(section, dtype, fast, device, tokenizer, weights)
    model.generation_config = with_stop_ids(model.generation_config, tokenizer)
    model.config.use_cache = model.generation_config.use_cache = section.use_cache
    kind = kind_of(model)
    held = how_held(model) if kind == "none" else kind
    precision = held if held == str(dtype) else f"{held}, products in {dtype}"
    logger.info("model %s: %s on %s, attention %s", base.path, precision, device, section.attn_implementation)
    if kind == "none":
        model.to(device)  # type: ignore[arg-type]
    return Loaded(model.eval(), tokenizer, base, device)


def _load_random(
    section: ModelSection, dtype: torch.dtype, fast: bool, device: torch.device, weights: str | None
) -> tuple[PreTrainedModel, Base]:
    config = random_shapes.parse_shape(section.path)
    if weights == Q8:
        check_q8(section, device, config, fast)
    base = _random_base(section, config)
    kind = model_class(config, fast=fast)
    model = random_shapes.random_model(config, section.seed, dtype, section.attn_implementation, kind)
    if section.quantization == "none":
        if weights:
            lay(model, weights, dtype)
        return model, base
    with tempfile.TemporaryDirectory() as folder:  # bitsandbytes quantises a model only while it is read from files
        model.save_pretrained(folder)
        del model
        return _read_model(Path(folder), config, section, dtype, fast, device), base


def _load_checkpoint(
    section: ModelSection,
    dtype: torch.dtype,
    fast: bool,
    device: torch.device,
    tokenizer: PreTrainedTokenizerBase | None,
    weights: str | None,
) -> tuple[PreTrainedModel, Base, PreTrainedTokenizerBase]:
    """Model, base and tokenizer of a checkpoint. All that is small is read and checked before the weights."""
    folder, revision = find_folder(section.path, section.revision)
    config = read_config(folder)
    section = section.model_copy(update={"quantization": held_as(section, config)})
    check_checkpoint(folder, config)
    base = base_in(folder, section.path, revision)
    tokenizer = tokenizer or load_tokenizer(section, base, config)
    # Only the fast engine's layers refuse a merge, which would round.
    has_form = fast and section.quantization == "none" and not missing_form(config)
    if weights == Q8:
        check_q8(section, device, config, fast)
    weights = weights if has_form else None
    model = _read_model(folder, config, section, read_dtype(weights, folder, dtype, device), fast, device)
    check_numbers([*model.named_parameters(), *scales_of(model)], str(folder))
    if weights:
        lay(model, weights, dtype)
    # PEFT writes this name into adapter_config.json. A hub id must stay there, not this machine's cache folder.
    name = section.path if revision else str(folder)
    model.config._name_or_path = model.name_or_path = name
    return model, base, tokenizer


def read_shape(section: ModelSection) -> ModelConfig:
    """The configuration of the model that `section` names. A hub id is fetched first; no weight is loaded.

    Raises:
        ModelError: the model can't be found, or its configuration can't be used.
    """
    if section.path.startswith(random_shapes.PREFIX):
        return random_shapes.parse_shape(section.path)
    return read_config(find_folder(section.path, section.revision)[0])


def find_base(section: ModelSection) -> Base:
    """Which base `section` names. A hub id is fetched first; no weight is loaded.

    Raises:
        ModelError: the model can't be found, or a weight file is damaged.
    """
    if section.path.startswith(random_shapes.PREFIX):
        return _random_base(section, random_shapes.parse_shape(section.path))
    folder, revision = find_folder(section.path, section.revision)
    return base_in(folder, section.path, revision)


def _random_base(section: ModelSection, config: ModelConfig) -> Base:
    shape = json.dumps(config.to_dict(), sort_keys=True, default=str)
    return Base(section.path, None, hashlib.sha256(f"{shape}{section.seed}".encode()).hexdigest(), section.seed)


def check_checkpoint(folder: Path, config: ModelConfig) -> None:
    """Make sure that a folder holds a whole checkpoint, before a weight is loaded.

    Raises:
        ModelError: its weights or its generation config can't be used.
    """
    check_whole(folder, config)
    read_generation(folder, config)


def base_in(folder: Path, path: str, revision: str | None) -> Base:
    """Which base a folder holds.

    Args:
        path, revision: what `find_folder` was given, and the commit that it found.

    Raises:
        ModelError: a weight file is damaged.
    """
    is_folder = revision is None and path != "starter"
    return Base(str(folder) if is_folder else path, revision, fingerprint(folder))


def _read_model(
    folder: Path, config: ModelConfig, section: ModelSection, dtype: torch.dtype, fast: bool, device: torch.device
) -> PreTrainedModel:
    source: dict[str, Any] = {"pretrained_model_name_or_path": folder, "use_safetensors": True}
    kind = model_class(config, fast=fast)
    with ExitStack() as files:
        if section.quantization != "none":
            source = {"pretrained_model_name_or_path": None, "state_dict": lazy_tensors(folder, files)}
            wanted = quantization_config(section.quantization, dtype)
            if own_form(config, str(folder)) == "none":
                source["quantization_config"] = wanted
            else:
                config.quantization_config = as_it_is(folder, config, wanted)
            if device.type != "cpu":
                source["device_map"] = {"": device}
        with told_as(ModelError, f"{section.path}: could not be loaded"):
            model: PreTrainedModel = kind.from_pretrained(
                config=config,
                dtype=dtype,
                attn_implementation=section.attn_implementation,
                local_files_only=True,
                **source,
            )
    if section.quantization != "none":
        model.generation_config = read_generation(folder, config)
        keep_packing(model)
        cast_others(model, dtype)
    return model


def read_generation(folder: Path, config: ModelConfig) -> GenerationConfig:
    """The generation config of a checkpoint, as transformers makes it when it loads the model from the folder.

    Raises:
        ModelError: the file is damaged. transformers would pass over it, and the ids that end an answer would be lost.
    """
    file = folder / GENERATION
    if not file.exists():
        return GenerationConfig.from_model_config(config)
    read_json(file)
    with told_as(ModelError, str(file)):
        generation = GenerationConfig.from_pretrained(folder, local_files_only=True)
    for key in ("eos_token_id", "bos_token_id", "pad_token_id"):
        ids = getattr(generation, key)
        if not all(type(i) is int for i in (ids if isinstance(ids, list) else [ids] if ids is not None else [])):
            raise ModelError(f"{file}: {key} must be a token id or a list of them, not {ids!r}")
    return generation


def find_folder(path: str, revision: str | None) -> tuple[Path, str | None]:
    """The local folder of a model, and its commit if `path` is a hub id (else None).

    Args:
        path: `starter`, a folder, or a hub id, which is fetched first.

    Raises:
        ModelError: `path` is neither a folder nor a repository that can be fetched.
    """
    if path == "starter":
        return starter.ensure_starter(), None
    folder = Path(path).expanduser()
    if folder.is_dir():
        if revision:
            raise ModelError(f"model.revision is for hub ids, and {path} is a folder; leave it out")
        return folder.resolve(), None
    if folder.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", path):
        raise ModelError(
            f"model.path: {path}: no such folder, and not a hub id such as microsoft/Phi-3-mini-4k-instruct"
        )
    return _snapshot(path, revision)


def _snapshot(repo: str, revision: str | None) -> tuple[Path, str]:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(repo, revision=revision, allow_patterns=HUB_FILES))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise ModelError(
            f"model.path: {repo}: could not be fetched from the hub ({first_line(error)}); check the name, the network "
            "and, for a gated repository, HF_TOKEN; or give a folder"
        ) from error
    return folder, folder.name  # the hub's cache names a snapshot's folder after its commit


def read_config(folder: Path) -> ModelConfig:
    """The folder's config.json as the class that transformers has for its family.

    `auto_map` is ignored: the code that it names is never run. A `rope_scaling` of the older type `su` is read as
    longrope.

    Raises:
        ModelError: there is no config.json, it is broken, or it belongs to another kind of model.
    """
    file = folder / "config.json"
    tree = read_json(file)
    kind = config_class(tree, file)
    tree.pop("auto_map", None)
    for key in ("rope_scaling", "rope_parameters"):
        _rename_rope(tree.get(key))
    layers = tree.get("num_hidden_layers")
    if isinstance(layers, int) and layers > MOST_LAYERS:  # even a list of their names would take memory
        raise ModelError(f"{file}: num_hidden_layers: {layers:,}: must be {MOST_LAYERS} or less")
    with told_as(ModelError, str(file)):
        config: ModelConfig = kind.from_dict(tree)
    wrong = [key for key in SIZES if type(size := getattr(config, key, 1)) is int and size < 1]
    if wrong:
        raise ModelError(f"{file}: {', '.join(f'{key}: {getattr(config, key)}' for key in wrong)}: must be 1 or more")
    return config


def _rename_rope(scaling: Any) -> None:
    """Rename the type `su`, longrope's first name. transformers itself renames it too late to fill in what longrope
    needs.
    """
    for key in ("type", "rope_type"):
        if isinstance(scaling, dict) and scaling.get(key) == "su":
            scaling[key] = "longrope"


def load_tokenizer(section: ModelSection, base: Base, config: ModelConfig | None) -> PreTrainedTokenizerBase:
    """The checkpoint's tokenizer, or the one that `section.tokenizer` names.

    transformers always gets a Phi-3 config together with the folder, whatever the model's family, and so reads
    tokenizer.json as it is. With another, it would rebuild a folder that names `LlamaTokenizer` as Llama's tokenizer
    and ignore parts of that file.

    Args:
        base: which base the tokenizer belongs to.
        config: the model's configuration; None if it is not known.

    Raises:
        ModelError: there is no tokenizer that can be loaded, it has no chat template that works, or it has more ids
            than the model.
    """
    if base.seed is not None and not section.tokenizer:
        return random_shapes.byte_tokenizer(random_shapes.parse_shape(section.path).vocab_size)
    source = section.tokenizer or section.path
    folder, _ = find_folder(source, None if section.tokenizer else base.revision)
    check_tokenizer_files(folder)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, config=Phi3Config(), local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # the tokenizers library raises bare Exception
        if (folder / TOKENIZER).exists():
            read_json(folder / TOKENIZER)  # if that is it, the sentence names the file
        raise ModelError(f"{source}: its tokenizer could not be loaded: {reason_of(error)}") from error
    check_template(tokenizer, source)
    if config is not None:
        check_vocabulary(tokenizer, config, source)
    if tokenizer.pad_token_id is None:
        # A token is never added: the embedding would grow, and adapters would become huge and impossible to load.
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return tokenizer


def with_stop_ids(generation: GenerationConfig | None, tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
    """A checkpoint's generation config, completed: every id that ends a turn stops an answer, and padding has an id."""
    generation = generation or GenerationConfig()
    declared = generation.eos_token_id or []
    declared = [declared] if isinstance(declared, int) else list(declared)
    generation.eos_token_id = [*declared, *(i for i in stop_ids(tokenizer) if i not in declared)]
    if generation.pad_token_id is None:
        generation.pad_token_id = tokenizer.pad_token_id
    return generation
