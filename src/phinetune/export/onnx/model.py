"""A run or a model as ONNX for onnxruntime-genai, built offline by that project's own model builder.

The builder reads a checkpoint's folder, so an adapter is merged into its base in a temporary one first. It holds the
whole model in memory: float32 for f32, the base's own dtype for int4.
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
from transformers import Phi3Config, PreTrainedTokenizerBase

from phinetune.checkpoints.tokenizer import TOKENIZER_FILES
from phinetune.config.run import make_config
from phinetune.errors import ModelError
from phinetune.export.base import open_base
from phinetune.export.longrope import attention_factor, is_longrope, rope
from phinetune.export.merge.merge import merge_run
from phinetune.export.onnx import chat as onnx_chat
from phinetune.export.source import is_adapter
from phinetune.files import staged_folder, write_text
from phinetune.logs import quiet_libraries

PRECISIONS = {"int4": "int4", "f32": "fp32"}  # the builder's names
HEAD_MULTIPLE = 16  # of its attention with rotary embeddings on a CPU
CHAT = "chat.py"
CONFIG = "genai_config.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
BUILDER = "onnxruntime_genai.models.builder"
# A cache no longer than the window is refused by the runtime for answers shorter than the window.
OPTIONS = ("hf_remote=false", "windowed_kv_cache=false")
# What such an export holds, and nothing else.
FILES = frozenset({CHAT, CONFIG, "model.onnx", "model.onnx.data", *TOKENIZER_FILES})


def is_own(folder: Path) -> bool:
    """Whether a folder holds such an export and nothing else."""
    names = {path.name for path in folder.iterdir()}
    return {CONFIG, CHAT} <= names <= FILES


def write_onnx(run: str, folder: Path, kind: str) -> None:
    """Write a run, an adapter folder or a model as ONNX into `folder`, which appears whole or not at all.

    Args:
        kind: f32, or int4: the matrices in blocks of 32 weights with a scale each.

    Raises:
        ModelError: onnxruntime-genai is missing, the run can't be merged, or the builder fails.
    """
    missing = [name for name in ("onnxruntime_genai", "onnx", "onnx_ir") if find_spec(name) is None]
    if missing:
        raise ModelError(f"--to onnx needs {', '.join(missing)}; pip install 'phinetune[onnx]' (Python 3.11 or newer)")
    with tempfile.TemporaryDirectory() as name, staged_folder(folder) as stage:
        place = Path(name)
        source, tokenizer = _lay_out(run, place, kind)
        _build(source, stage, place / "cache", kind)
        tokenizer.save_pretrained(str(stage))  # over the builder's own, which may be rebuilt as another class
        _keep_spaces_together(stage / TOKENIZER_CONFIG, tokenizer)
        shutil.copyfile(str(onnx_chat.__file__), stage / CHAT)
        for file in set(stage.iterdir()):
            if file.name not in FILES:
                file.unlink()


def _lay_out(run: str, place: Path, kind: str) -> tuple[Path, PreTrainedTokenizerBase]:
    """A folder in `place` for the builder to read: the model's own files, or the merged run's, and a config.json for
    it.
    """
    quiet_libraries()
    if is_adapter(run):
        merge_run(run, place / "merged", dtype="float32" if kind == "f32" else None)
        run = str(place / "merged")
    files = open_base(make_config({"model": {"path": run}}).model)
    if files.folder is None:
        raise ModelError(f"{run}: is made in memory, and --to onnx reads a folder; give a run, a folder or a hub id")
    head = getattr(files.config, "head_dim", None) or files.config.hidden_size // files.config.num_attention_heads
    if head % HEAD_MULTIPLE:
        raise ModelError(f"{run}: {head} dimensions a head, and onnxruntime takes multiples of {HEAD_MULTIPLE} alone")
    source = place / "model"
    source.mkdir()
    for file in [*files.folder.glob("*.safetensors"), *files.folder.glob("*.safetensors.index.json")]:
        (source / file.name).symlink_to(file)
    _config_for_builder(files.config, kind).save_pretrained(str(source))
    files.generation_config.save_pretrained(str(source))
    files.tokenizer.save_pretrained(str(source))
    return source, files.tokenizer


def _keep_spaces_together(file: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Name the tokenizer class under which the runtime merges runs of spaces, as Phi-3's vocabulary does.

    onnxruntime-genai 0.18 goes by `tokenizer_class`: under the other names that were tried it cuts a SentencePiece
    vocabulary's text at every space, so that two spaces become other ids than in training. In transformers the name
    would stand for another tokenizer; this folder is for the runtime alone.
    """
    if '"▁"' in str(tokenizer.backend_tokenizer.to_str()):
        tree = json.loads(file.read_text(encoding="utf-8"))
        write_text(file, json.dumps({**tree, "tokenizer_class": "GemmaTokenizer"}, indent=2) + "\n")


def _config_for_builder(config: Phi3Config, kind: str) -> Phi3Config:
    """What the builder does not see by itself in a Phi-3's configuration, said in the keys that it reads."""
    made = copy.deepcopy(config)
    made.architectures = ["Phi3ForCausalLM"]
    if kind == "f32":
        made.dtype = torch.float32  # what the weights are read in, whatever the files hold
    if config.sliding_window and config.sliding_window < config.max_position_embeddings:
        made.layer_types = ["sliding_attention"] * config.num_hidden_layers  # else it leaves the window out
    if is_longrope(config):
        factor = attention_factor(config)
        made.rope_parameters = {**rope(config), "type": "longrope", "short_mscale": factor, "long_mscale": factor}
    return made


def _build(source: Path, target: Path, cache: Path, kind: str) -> None:
    """Run the builder in a process of its own: it prints much, and fails by whatever exception."""
    command = [sys.executable, "-m", BUILDER, "-i", str(source), "-o", str(target), "-c", str(cache)]
    command += ["-p", PRECISIONS[kind], "-e", "cpu", "--extra_options", *OPTIONS]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    if done.returncode:
        last = [line for line in done.stderr.splitlines() if line.strip()][-1:] or [f"status {done.returncode}"]
        raise ModelError(f"onnxruntime-genai's model builder failed: {last[0].strip()}")
