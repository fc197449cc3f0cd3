"""Opens a checkpoint's tokenizer and configuration without its weights. Rendering and counting need no more."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedTokenizerBase

from phinetune.checkpoints import random_shapes
from phinetune.checkpoints.load import HUB_FILES, Base, find_folder, load_tokenizer, read_config
from phinetune.config.model import ModelSection
from phinetune.engine.families import ModelConfig
from phinetune.errors import ModelError, first_line

# The files that a tokenizer's save_pretrained may write into a folder.
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
    """The same tokenizer that `load_base` loads. If `section` names a hub id, only its small files are fetched.

    Raises:
        ModelError: there is no tokenizer that can be loaded, or it has no chat template.
    """
    if section.path.startswith(random_shapes.PREFIX) and not section.tokenizer:
        return random_shapes.byte_tokenizer(random_shapes.parse_shape(section.path).vocab_size)
    # A tokenizer that is named by itself has a repository of its own, and model.revision is not a commit of that one.
    source = section.tokenizer or section.path
    folder = _small_files(source, None if section.tokenizer else section.revision)
    local = section.model_copy(update={"path": str(folder), "tokenizer": None, "revision": None})
    config = read_config(folder) if (folder / "config.json").is_file() and not section.tokenizer else None
    return load_tokenizer(local, Base(source, None, ""), config)


def open_config(section: ModelSection) -> ModelConfig:
    """The configuration of the model that `load_base` loads. If `section` names a hub id, only its small files are
    fetched.

    Raises:
        ModelError: there is no configuration, or it belongs to a model of another family.
    """
    if section.path.startswith(random_shapes.PREFIX):
        return random_shapes.parse_shape(section.path)
    return read_config(_small_files(section.path, section.revision))


def _small_files(source: str, revision: str | None) -> Path:
    if source == "starter" or Path(source).expanduser().exists() or source.count("/") != 1:
        return find_folder(source, revision)[0]
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=SMALL_FILES))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise ModelError(
            f"model.path: {source}: could not be fetched from the hub ({first_line(error)}); check the name, the "
            "network and, for a gated repository, HF_TOKEN; or give a folder"
        ) from error
