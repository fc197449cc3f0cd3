"""What is fuzzed: readers of files that strangers write, each as a function of some bytes and an empty folder.

A target may raise a `PhinetuneError`, or what its reader documents beside it; anything else is a finding. So is an
input that takes more than `MOST_SECONDS` of the processor or `MOST_MEMORY` more than any input before it.
"""

from __future__ import annotations

import contextlib
import json
import resource
import shutil
import struct
import time
import traceback
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from jinja2.exceptions import TemplateError
from safetensors.torch import save
from transformers import Phi3Config

from chats.template_helpers import byte_level, template_tokenizer
from helpers import TINY
from phinetune.chats.encoder import ChatEncoder, make_encoder
from phinetune.chats.template_rendering import apply_template
from phinetune.checkpoints.adapter_fit import ADAPTER_CONFIG, ADAPTER_WEIGHTS, check_fit
from phinetune.checkpoints.adapters import read_adapter_config, read_base
from phinetune.checkpoints.random_shapes import parse_shape
from phinetune.checkpoints.weight_files import INDEX, WEIGHTS, held_tensors, read_tensors
from phinetune.checkpoints.whole import check_whole
from phinetune.config.data import DataSection
from phinetune.config.run import load_config
from phinetune.data.prepare.encode_rows import RowEncoder
from phinetune.data.read.any_source import read_first
from phinetune.errors import PhinetuneError
from phinetune.exporting.convert.adapter_files import read_loralib, read_peft

CORPUS = Path(__file__).parent / "corpus"
MOST_SECONDS = 2.0
MOST_MEMORY = 500 << 20  # bytes
LONGEST = 4096  # bytes of an input
CHAT = [{"role": "user", "content": "Hi 12"}, {"role": "assistant", "content": "Yes."}]
SUFFIXES = (".jsonl", ".json", ".csv", ".ndjson")


def data(given: bytes, folder: Path) -> None:
    """A data file, all the way to ids and labels; its first byte says of which kind it is."""
    file = folder / f"rows{SUFFIXES[given[0] % len(SUFFIXES)]}"
    file.write_bytes(given[1:])
    rows, _ = read_first(str(file), "train", 100)
    for _ in RowEncoder(DataSection(train=str(file)), _encoder(), 200)(rows):
        pass


def weights(given: bytes, folder: Path) -> None:
    """A weight file, its header alone with zeros behind it, or an index beside a good file."""
    kind, rest = given[0] % 3, given[1:]
    file = folder / WEIGHTS
    if kind == 0:
        file.write_bytes(rest)
        _refused(lambda: read_tensors(file))
    elif kind == 1:
        file.write_bytes(struct.pack("<Q", len(rest)) + rest + bytes(512))
        _refused(lambda: read_tensors(file))
    else:
        (folder / "a.safetensors").write_bytes(_good_weights())
        (folder / INDEX).write_bytes(rest)
    _refused(lambda: held_tensors(folder))
    check_whole(folder, _shape())


def adapters(given: bytes, folder: Path) -> None:
    """An adapter's configuration beside good weights, the record of its base, or a torch file of loralib's."""
    kind, rest = given[0] % 3, given[1:]
    if kind == 0:
        (folder / ADAPTER_CONFIG).write_bytes(rest)
        (folder / ADAPTER_WEIGHTS).write_bytes(_good_adapter())
        _refused(lambda: read_peft(folder))
        check_fit(_shape(), read_adapter_config(folder), folder)
    elif kind == 1:
        (folder / "base.json").write_bytes(rest)
        read_base(folder)
    else:
        (folder / "lora.pt").write_bytes(rest)
        read_loralib(folder / "lora.pt")


def config(given: bytes, folder: Path) -> None:
    """A run's YAML file."""
    file = folder / "run.yaml"
    file.write_bytes(given)
    load_config(file)


def templates(given: bytes, folder: Path) -> None:
    """A chat template."""
    tokenizer = _tokenizer()
    tokenizer.chat_template = given.decode("utf-8", "replace")
    try:
        for reply in (False, True):
            apply_template(tokenizer, [CHAT], reply=reply)
    except TemplateError:
        pass


TARGETS: dict[str, Callable[[bytes, Path], None]] = {
    "data": data,
    "weights": weights,
    "adapters": adapters,
    "config": config,
    "templates": templates,
}
# Pieces that inputs are put together of, besides the corpus.
WORDS = {
    "data": ['"messages"', '"role"', '"content"', '"conversations"', '"from"', '"value"', '"tools"', '"tool_calls"',
             '"instruction"', '"output"', '"prompt"', '"completion"', '"input_ids"', '"labels"', '"text"', "null",
             "assistant", "user", "system", "\\ud800", "1e999", "NaN", "-0", "\ufeff"],
    "weights": ["__metadata__", '"dtype"', '"shape"', '"data_offsets"', "F32", "BF16", "F8_E4M3", "weight_map",
                "a.safetensors", "model.embed_tokens.weight", "lm_head.weight", "[0,0]", "1e999", "null"],
    "adapters": ['"peft_type"', "LORA", '"r"', '"lora_alpha"', '"target_modules"', "qkv_proj", '"rank_pattern"',
                 '"alpha_pattern"', '"layers_to_transform"', '"layers_pattern"', '"layer_replication"', '"use_dora"',
                 '"modules_to_save"', '"bias"', '"init_lora_weights"', '"exclude_modules"', '"trainable_token_indices"',
                 '"target_parameters"', '"eva_config"', '"corda_config"', "all-linear", "(a+)+$", "null", "1e999"],
    "config": ["model:", "path:", "data:", "train:", "peft_config:", "training_config:", "evaluation:", "objective:",
               "engine:", "&a ", "*a", "<<: ", "!!python/object:", "- ", "? ", "{", "}", "0x", "1_0", ".inf", "~"],
    "templates": ["{%", "%}", "{{", "}}", "for ", "endfor", "if ", "endif", "set ", "macro ", "endmacro", "call ",
                  "endcall", "filter ", "messages", "loop", "namespace(", "|join", "|tojson", "|map", "|center(",
                  "range(", "generation", "endgeneration", ".format(", " * ", " ** ", " ~ ", "self", "caller()",
                  "|sort", "|groupby", "|replace(", "recursive", "loop(", "cycler(", "joiner(", "__class__", "'%s'%"],
}  # fmt: skip


def problem_of(target: str, given: bytes, folder: Path) -> str | None:
    """What an input does that it must not do; None if it does nothing of the kind. The folder is emptied."""
    for place in folder.iterdir():
        place.unlink() if place.is_file() else shutil.rmtree(place)
    began, memory = time.process_time(), _peak()
    try:
        TARGETS[target](given, folder)
    except PhinetuneError:
        pass
    except Exception:
        return traceback.format_exc()
    took, more = time.process_time() - began, _peak() - memory
    if took > MOST_SECONDS:
        return f"{took:.1f} s of the processor"
    return f"{more >> 20:,} MiB more than before" if more > MOST_MEMORY else None


def seeds(target: str) -> list[Path]:
    """The inputs that are kept."""
    return sorted((CORPUS / target).iterdir())


def _refused(read: Callable[[], Any]) -> None:
    """Read something that may be refused, so that what comes after it is read, too."""
    with contextlib.suppress(PhinetuneError):
        read()


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


@cache
def _shape() -> Phi3Config:
    return parse_shape(TINY)


@cache
def _encoder() -> ChatEncoder:
    return make_encoder(template_tokenizer("phi-4-mini"))


@cache
def _tokenizer() -> Any:
    return byte_level("", ["<|end|>"], left=False)


@cache
def _good_weights() -> bytes:
    return save({"model.norm.weight": torch.ones(32)})


@cache
def _good_adapter() -> bytes:
    layer = "base_model.model.model.layers.0.self_attn.qkv_proj.lora_"
    return save({f"{layer}A.weight": torch.ones(4, 32), f"{layer}B.weight": torch.ones(64, 4)})


def write_first_seeds() -> None:
    """The inputs that the corpus began with."""
    row = {"messages": CHAT}
    good = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["qkv_proj"], "task_type": "CAUSAL_LM"}
    header = json.dumps({"a": {"dtype": "F32", "shape": [128], "data_offsets": [0, 512]}}).encode()
    tensors: Any = {"model.0.lora_A": torch.ones(2, 3), "model.0.lora_B": torch.ones(4, 2)}
    torch.save(tensors, CORPUS / "lora.pt")
    first = {
        "data": [b"\0" + json.dumps(row).encode(), b"\1" + json.dumps([row, {"text": "hello"}]).encode(),
                 b"\2instruction,input,output\nSay hi,,Hi\n", b"\0" + json.dumps({"conversations": [
                     {"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes"}]}).encode(),
                 b'\0{"prompt": "a", "completion": "b"}\n{"input_ids": [1, 2], "labels": [-100, 2]}'],
        "weights": [b"\0" + save({"a": torch.ones(2)}), b"\1" + header,
                    b'\2{"metadata": {}, "weight_map": {"model.norm.weight": "a.safetensors"}}'],
        "adapters": [b"\0" + json.dumps(good).encode(), b"\2" + (CORPUS / "lora.pt").read_bytes(),
                     b'\1{"path": "a", "revision": null, "fingerprint": "b", "seed": 1}',
                     b"\0" + json.dumps(good | {"target_modules": "all-linear", "rank_pattern": {"^a": 2}}).encode()],
        "config": [b"model:\n  path: a\ndata:\n  train: [b.jsonl, {path: c, weight: 2}]\npeft_config: {r: 4}\n"
                   b"training_config: {max_steps: 3}\n", b"evaluation: &x {max_prompts: 3}\nengine: *x\n"],
        "templates": [b"{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] }}{% endfor %}"
                      b"{% if add_generation_prompt %}<|assistant|>{% endif %}",
                      b"{%- set ns = namespace(x='') -%}{% macro f(a) %}{{ a|tojson }}{% endmacro %}"
                      b"{{ f(messages) }}{{ '%s' % 3 }}{{ messages|map(attribute='role')|join(', ') }}"],
    }  # fmt: skip
    (CORPUS / "lora.pt").unlink()
    for target, inputs in first.items():
        (CORPUS / target).mkdir(parents=True, exist_ok=True)
        for i, given in enumerate(inputs):
            (CORPUS / target / f"seed-{i}").write_bytes(given)
