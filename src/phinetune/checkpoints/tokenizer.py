"""A checkpoint's tokenizer and configuration without its weights: all that rendering and counting takes."""

from __future__ import annotations

from pathlib import Path

from transformers import Phi3Config, PreTrainedTokenizerBase

from phinetune.checkpoints import random_shapes as synthetic
from phinetune.checkpoints.load import HUB_FILES, Base, find_folder, load_tokenizer, read_config
from phinetune.config.run import ModelSection
from phinetune.errors import ModelError

# What a tokenizer's save_pretrained may leave in a folder.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
)
SMALL_FILES = [pattern for pattern in HUB_FILES if "safetensors" not in pattern]


def open_tokenizer(section: ModelSection) -> PreTrainedTokenizerBase:
    """The tokenizer that `load_base` would give, of a hub id only its small files fetched.

    Raises:
        ModelError: none there, or none that has a chat template.
    """
    if section.path.startswith(synthetic.PREFIX) and not section.tokenizer:
        return synthetic.byte_tokenizer(synthetic.parse_shape(section.path).vocab_size)
    # A named tokenizer has its own repository, to which model.revision does not belong.
    source = section.tokenizer or section.path
    folder = _small_files(source, None if section.tokenizer else section.revision)
    plain = section.model_copy(update={"path": str(folder), "tokenizer": None, "revision": None})
    config = read_config(folder) if (folder / "config.json").is_file() and not section.tokenizer else None
    return load_tokenizer(plain, Base(source, None, ""), config)


def open_config(section: ModelSection) -> Phi3Config:
    """The configuration of the model that `load_base` would load, of a hub id only its small files fetched.

    Raises:
        ModelError: none there, or of another family.
    """
    if section.path.startswith(synthetic.PREFIX):
        return synthetic.parse_shape(section.path)
    return read_config(_small_files(section.path, section.revision))


def _small_files(source: str, revision: str | None) -> Path:
    if source == "starter" or Path(source).expanduser().exists() or source.count("/") != 1:
        return find_folder(source, revision)[0]
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=SMALL_FILES))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"model.path: {source}: its tokenizer could not be fetched from the hub ({first}); check the name, the "
            "network and, for a gated repository, HF_TOKEN; or give a folder"
        ) from error
