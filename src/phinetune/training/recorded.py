"""What decides the result of a run, as start.json records it, so that a resumed run can be held against it.

The record is flat: `section.key`, and the value that is in force, not the way it was written. Rows, tokenizer and
weights are recorded by their content.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow
import pyarrow.compute
import torch
from datasets import Dataset
from peft.tuners.lora import LoraLayer

from phinetune.checkpoints.prequantized import held_as
from phinetune.config.places import with_absolute_places
from phinetune.data.prepare.cache import tokenizer_digest
from phinetune.data.prepare.chat_sets import ChatSet
from phinetune.secret_text import tree_without_secrets
from phinetune.training.environment import describe_environment
from phinetune.training.prepare import PreparedRun
from phinetune.training.rehearsal import adapted_shape
from phinetune.training.settings import BITSANDBYTES
from phinetune.training.warm_start import start_digest

Record = dict[str, Any]
# What is recorded by its content. The keys of `data` only say how the rows came about.
TRAIN_ROWS, HELD_OUT_ROWS, TOKENIZER, WEIGHTS = "the training rows", "the held-out rows", "the tokenizer", "the base"
STARTING_ADAPTER = "the adapter that training goes on from"
TRAIN_COUNT, HELD_OUT_COUNT = "data.train holds", "data.eval holds"
# The libraries whose code computes a step.
LIBRARIES = ("phinetune", "torch", "transformers", "peft", "trl", "accelerate")
# Keys that name this run and this machine, or that hold a secret.
LEFT_OUT = {
    "model": {"revision", "seed"},  # the weights are recorded
    "training_config": {"output_dir", "run_name", "hub_token", "resume_from_checkpoint", "eos_token", "pad_token"},
    "peft_config": {"base_model_name_or_path", "revision", "peft_version", "auto_mapping", "inference_mode"},
}
BATCH = 1000  # rows that are hashed at a time


def record_of(prepared: PreparedRun, fingerprint: str) -> Record:
    """What decides the result of a prepared run, as JSON holds it.

    Args:
        fingerprint: of the base.
    """
    chats = prepared.chats
    return settings_of(prepared) | {
        TRAIN_ROWS: rows_digest(chats.train),
        HELD_OUT_ROWS: rows_digest(chats.held_out) if chats.held_out else None,
        TOKENIZER: tokenizer_digest(prepared.tokenizer),
        WEIGHTS: fingerprint,
        STARTING_ADAPTER: start_digest(prepared.config.model),
        TRAIN_COUNT: count_of(chats.train.report.to_dict()),
        HELD_OUT_COUNT: count_of(chats.held_out.report.to_dict()) if chats.held_out else None,
    }


def count_of(report: Mapping[str, Any]) -> str:
    """How much a set holds, from its report."""
    return f"{report['kept']:,} chats, {report['tokens']:,} tokens, {report['trainable_tokens']:,} of them trained on"


def settings_of(prepared: PreparedRun) -> Record:
    """The part of the record that follows from the configuration and the machine."""
    config, args = with_absolute_places(prepared.config), prepared.args
    fast = prepared.engine.fast
    filled = bool(fast.fill) if fast else args.packing
    packing = f"tokens, {prepared.settings.max_length} a row" if filled else "conversations"
    tree = {
        "model": config.model.model_dump()
        | {"dtype": str(prepared.dtype), "device": prepared.device.type}
        | {"quantization": held_as(config.model, prepared.shape)},
        "data": config.data.model_dump() | {"packing": packing},
        "peft_config": _peft(prepared),
        "training_config": args.to_dict(),
        "objective": {"kind": prepared.objective.kind, **prepared.objective.options.model_dump()},
        "engine": config.engine.model_dump() | {"kind": "fast" if fast else "plain"},
        "evaluation": config.evaluation.model_dump(),
        "processes": {"number": args.world_size},
        "versions": _versions(prepared),
    }
    flat = {
        f"{section}.{key}": value
        for section, part in tree.items()
        for key, value in part.items()
        if key not in LEFT_OUT.get(section, ())
    }
    # Without secrets, as start.json holds it: what is compared on `--resume` must be alike on both sides.
    record: Record = tree_without_secrets(json.loads(json.dumps(flat, sort_keys=True, default=_plain)))
    return record


def _peft(prepared: PreparedRun) -> Mapping[str, Any]:
    """PEFT's configuration with its defaults; `target_modules` is what has an adapter, however it was asked for."""
    model = adapted_shape(prepared.settings, prepared.shape, torch.float32)
    adapted: dict[str, list[int]] = {}
    for name, layer in model.get_base_model().named_modules():
        if isinstance(layer, LoraLayer):
            number = next((int(part) for part in name.split(".") if part.isdigit()), -1)
            adapted.setdefault(name.rsplit(".", 1)[-1], []).append(number)
    settled: Mapping[str, Any] = model.peft_config["default"].to_dict()
    return {
        **settled,
        "target_modules": ", ".join(f"{name} ({_layers(numbers)})" for name, numbers in sorted(adapted.items())),
        "init_lora_weights": prepared.settings.peft.get("init_lora_weights", True),
    }


def _layers(numbers: Sequence[int]) -> str:
    first, last = numbers[0], numbers[-1]
    whole = len(numbers) > 2 and list(numbers) == list(range(first, last + 1))
    return f"layers {first} to {last}" if whole else f"layers {', '.join(map(str, numbers))}"


def _versions(prepared: PreparedRun) -> Mapping[str, str]:
    installed = describe_environment(prepared.args)
    optimizer = str(getattr(prepared.args.optim, "value", prepared.args.optim))
    quantised = held_as(prepared.config.model, prepared.shape) != "none" or BITSANDBYTES.match(optimizer)
    return {
        name: installed[name] for name in (*LIBRARIES, *(["bitsandbytes"] if quantised else [])) if name in installed
    }


def _plain(value: Any) -> Any:
    """What JSON has no form for: a set becomes a sorted list, anything else its text."""
    return sorted(map(str, value)) if isinstance(value, (set, frozenset)) else str(value)


def rows_digest(chats: ChatSet) -> str:
    """SHA-256 over the ids, the labels and whatever else the examples of a set have, in their order.

    Of a stream only the first rows are at hand. They stand for all.
    """
    rows = ChatSet(chats.chats, chats.encoded, chats.report).dataset()
    assert isinstance(rows, Dataset)
    total = hashlib.sha256()
    for column in sorted(set(rows.column_names) - {"length"}):
        total.update(column.encode())
        for batch in rows.select_columns(column).with_format("arrow").iter(batch_size=BATCH):
            _hash_array(total, batch[column].combine_chunks())
    return total.hexdigest()


def _hash_array(total: Any, array: Any) -> None:
    """Hash the lengths of lists level by level, then the numbers in them, alike for every width of integers."""
    while pyarrow.types.is_list(array.type) or pyarrow.types.is_large_list(array.type):
        total.update(pyarrow.compute.list_value_length(array).to_numpy(zero_copy_only=False).astype(np.int64).tobytes())
        array = array.flatten()
    values = array.to_numpy(zero_copy_only=False)
    kind = np.float64 if values.dtype.kind == "f" else np.int64 if values.dtype.kind in "iub" else str
    total.update(values.astype(kind).tobytes())
