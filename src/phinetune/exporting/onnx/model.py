"""Writing a run or a model as ONNX for onnxruntime-genai. That project's own model builder does it, offline.

The builder reads the folder of a checkpoint, so an adapter is first merged into its base in a temporary folder. The
builder holds the whole model in memory: in float32 for f32, in the base's own dtype for int4.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from phinetune.checkpoints.tokenizer import TOKENIZER_FILES
from phinetune.config.run import make_config
from phinetune.engine.families import ModelConfig, transformers_class
from phinetune.errors import ModelError
from phinetune.exporting.base_files import open_base
from phinetune.exporting.checkpoint_source import is_adapter
from phinetune.exporting.longrope import attention_factor, is_longrope, rope
from phinetune.exporting.merge.merge import merge_run
from phinetune.exporting.merge.weights import FolderWeights
from phinetune.exporting.onnx import chat as onnx_chat
from phinetune.files import staged_folder, write_text
from phinetune.logs import quiet_libraries

PRECISIONS = {"int4": "int4", "f32": "fp32"}  # the builder's name by phinetune's
HEAD_MULTIPLE = 16  # onnxruntime's rotary attention on a CPU takes multiples of this many dimensions per head
CHAT = "chat.py"
CONFIG = "genai_config.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
BUILDER = "onnxruntime_genai.models.builder"
# No cache that is only as long as the attention window: the runtime refuses it for answers shorter than the window.
OPTIONS = ("hf_remote=false", "windowed_kv_cache=false")
# All files that an export may hold.
FILES = frozenset({CHAT, CONFIG, "model.onnx", "model.onnx.data", *TOKENIZER_FILES})


def is_own(folder: Path) -> bool:
    """Whether a folder holds an export for onnxruntime-genai and nothing else."""
    names = {path.name for path in folder.iterdir()}
    return {CONFIG, CHAT} <= names <= FILES


def write_onnx(run: str, folder: Path, kind: str) -> None:
    """Write a run, an adapter folder or a model as ONNX into `folder`. The folder appears whole or not at all.

    Args:
        kind: f32, or int4: blocks of 32 weights of a matrix share a scale.

    Raises:
        ModelError: onnxruntime-genai is missing, the run can't be merged, or the builder fails.
    """
    missing = [name for name in ("onnxruntime_genai", "onnx", "onnx_ir") if find_spec(name) is None]
    if missing:
        raise ModelError(f"--to onnx needs {', '.join(missing)}; pip install 'phinetune[onnx]' (Python 3.11 or newer)")
    with tempfile.TemporaryDirectory() as name, staged_folder(folder) as stage:
        place = Path(name)
        source, tokenizer = _folder_for_builder(run, place, kind)
        _build(source, stage, place / "cache", kind)
        tokenizer.save_pretrained(str(stage))  # replaces the builder's, which may have another class
        _keep_spaces_together(stage / TOKENIZER_CONFIG, tokenizer)
        shutil.copyfile(str(onnx_chat.__file__), stage / CHAT)
        for file in set(stage.iterdir()):
            if file.name not in FILES:
                file.unlink()


def _folder_for_builder(run: str, place: Path, kind: str) -> tuple[Path, PreTrainedTokenizerBase]:
    """Make a folder in `place` that the builder can read; also returns the tokenizer.

    The folder has the model's weights, or those of the merged run, and a config.json for the builder.
    """
    quiet_libraries()
    if is_adapter(run):
        merge_run(run, place / "merged", dtype="float32" if kind == "f32" else None)
        run = str(place / "merged")
    files = open_base(make_config({"model": {"path": run}}).model)
    if isinstance(files.weights, FolderWeights) and files.weights.packed:
        raise ModelError(
            f"{run}: its weights are in nf4, and the builder of --to onnx does not read these; give the 16-bit "
            "checkpoint"
        )
    if files.folder is None:
        raise ModelError(f"{run}: is made in memory, but --to onnx needs a folder; give a run, a folder or a hub id")
    head = getattr(files.config, "head_dim", None) or files.config.hidden_size // files.config.num_attention_heads
    if head % HEAD_MULTIPLE:
        raise ModelError(f"{run}: {head} dimensions per head; onnxruntime takes only multiples of {HEAD_MULTIPLE}")
    source = place / "model"
    source.mkdir()
    for file in [*files.folder.glob("*.safetensors"), *files.folder.glob("*.safetensors.index.json")]:
        (source / file.name).symlink_to(file)
    _config_for_builder(files.config, kind).save_pretrained(str(source))
    files.generation_config.save_pretrained(str(source))
    files.tokenizer.save_pretrained(str(source))
    return source, files.tokenizer


def _keep_spaces_together(file: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Set the tokenizer class so that the runtime merges runs of spaces, as Phi-3's vocabulary does.

    onnxruntime-genai 0.18 chooses its tokenizer by `tokenizer_class`. With the other names that were tried, it cuts the
    text at every space if the vocabulary is SentencePiece's, and two spaces get other ids than in training. In
    transformers this name means another tokenizer, but only the runtime reads this folder.
    """
    if '"▁"' in str(tokenizer.backend_tokenizer.to_str()):
        tree = json.loads(file.read_text(encoding="utf-8"))
        write_text(file, json.dumps({**tree, "tokenizer_class": "GemmaTokenizer"}, indent=2) + "\n")


def _config_for_builder(config: ModelConfig, kind: str) -> ModelConfig:
    """A model's configuration in the keys that the builder reads. Otherwise it would overlook some settings."""
    adjusted = copy.deepcopy(config)
    adjusted.architectures = [transformers_class(config).__name__]
    if kind == "f32":
        adjusted.dtype = torch.float32  # the builder reads the weights in this dtype, whatever the files hold
    window = getattr(config, "sliding_window", None)
    if window and window < config.max_position_embeddings:
        adjusted.layer_types = ["sliding_attention"] * config.num_hidden_layers  # else it ignores the window
    if is_longrope(config):
        factor = attention_factor(config)
        adjusted.rope_parameters = {**rope(config), "type": "longrope", "short_mscale": factor, "long_mscale": factor}
    return adjusted


def _build(source: Path, target: Path, cache: Path, kind: str) -> None:
    """Run the builder in a process of its own, because it prints much and may raise any exception."""
    command = [sys.executable, "-m", BUILDER, "-i", str(source), "-o", str(target), "-c", str(cache)]
    command += ["-p", PRECISIONS[kind], "-e", "cpu", "--extra_options", *OPTIONS]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    if done.returncode:
        last = [line for line in done.stderr.splitlines() if line.strip()][-1:] or [f"status {done.returncode}"]
        raise ModelError(f"onnxruntime-genai's model builder failed: {last[0].strip()}")
