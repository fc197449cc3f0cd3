"""Merging a run into its base, and writing the result as a transformers checkpoint, shard by shard.

    phinetune merge runs/demo --out merged

The written model needs neither PEFT nor phinetune. `merged.json` beside the weights says which adapter was merged into
which base.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from phinetune.checkpoints.small_files import read_json
from phinetune.checkpoints.weight_files import INDEX, WEIGHTS
from phinetune.engine.families import ModelConfig, is_fused
from phinetune.errors import ModelError
from phinetune.exporting.hub.merged_card import write_merged_card
from phinetune.exporting.merge.merged import (
    MERGED_FILE,
    OUTPUT_DTYPES,
    OWN_NF4,
    SHARD_BYTES,
    SIXTEEN_BIT,
    MergedCheckpoint,
    adapter_digest,
    open_merged,
)
from phinetune.files import staged_folder, write_text
from phinetune.run_folder import CARD

TOKENIZER_MODEL = "tokenizer.model"  # sentencepiece's file; llama.cpp reads it, transformers 5 does not
# Keys of the base's config.json that are left out: they don't describe the merged model, or make clients run or expect
# other code.
NOT_KEPT = ("auto_map", "_name_or_path", "torch_dtype", "quantization_config", "transformers_version")


@dataclass(frozen=True)
class Merge:
    """A finished merge.

    Attributes:
        path: the folder that was written.
        record: the content of merged.json.
        tensors: how many tensors the adapter changed, and how many there are.
        files: number of weight files.
        size: bytes of the weights.
        untied: whether the base's embedding and head are one tensor and the merged model's are two.
    """

    path: Path
    record: dict[str, Any]
    tensors: tuple[int, int]
    files: int
    size: int
    untied: bool

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the weights were written in."""
        return OUTPUT_DTYPES[self.record["dtype"]]

    def report(self) -> list[str]:
        """What to tell the user."""
        base = self.record["base"]["path"]
        weights = self.record["base_weights"]
        quantised = {SIXTEEN_BIT: "", OWN_NF4: ", whose nf4 weights were turned back"}.get(
            weights, f", quantised to {weights} and back"
        )
        changed, count = self.tensors
        lines = [
            f"Merged {self.record['adapter']['path']} into {base}{quantised}: {changed} of {count} tensors changed, "
            f"products in float32, written as {self.record['dtype']}",
        ]
        if self.untied:
            lines.append("The adapter changes the embedding or the output head alone, so they are no longer tied")
        size = f"{self.size / 1e9:.2f} GB" if self.size >= 1e9 else f"{self.size / 1e6:.1f} MB"
        files = "one file" if self.files == 1 else f"{self.files} files"
        return [*lines, f"Wrote {self.path}: {size} of weights in {files}, tokenizer, {MERGED_FILE} and a model card"]


def merge_run(
    run: str | Path,
    out: str | Path,
    *,
    dtype: str | torch.dtype | None = None,
    base: str = SIXTEEN_BIT,
    shard_bytes: int = SHARD_BYTES,
) -> Merge:
    """Merge a run, one of its checkpoints or an adapter folder into its base, and write the model to `out`.

    Args:
        out: a folder that does not exist yet, or an empty one. It appears whole or not at all.
        dtype, base: see `open_merged`.
        shard_bytes: the largest size of a weight file. One shard and the adapter are in memory at a time.

    Raises:
        ModelError: `out` is taken, or the run can't be merged.
    """
    out = Path(out).expanduser()
    _check_free(out)
    merged = open_merged(run, dtype=dtype, base=base)
    record = _record(merged)
    with staged_folder(out) as stage:
        files, size = _write_weights(merged, stage, shard_bytes)
        _write_config(merged, stage)
        merged.generation_config.save_pretrained(str(stage))
        merged.tokenizer.save_pretrained(str(stage))
        _copy_tokenizer_model(merged, stage)
        write_text(stage / MERGED_FILE, json.dumps(record, indent=2, ensure_ascii=False) + "\n")
        write_text(stage / CARD, write_merged_card(out.resolve().name, record))
    return Merge(out, record, (len(merged.changed()), len(merged.names())), files, size, merged.untied)


def record_losses(merge: Merge, losses: Mapping[str, float]) -> None:
    """Add held-out losses to the record and the card.

    Args:
        losses: nats per labelled token, by `base`, `adapter` and `merged`.
    """
    merge.record["held_out_loss"] = dict(losses)
    write_text(merge.path / MERGED_FILE, json.dumps(merge.record, indent=2, ensure_ascii=False) + "\n")
    write_text(merge.path / CARD, write_merged_card(merge.path.resolve().name, merge.record))


def _check_free(out: Path) -> None:
    if out.is_dir() and not out.is_symlink() and not any(out.iterdir()):
        return
    if (out / MERGED_FILE).is_file():
        raise ModelError(f"{out}: already holds a merged model; nothing is overwritten, so name another folder")
    if os.path.lexists(out):
        raise ModelError(f"{out}: is there already; nothing is overwritten, so name another folder")


def _record(merged: MergedCheckpoint) -> dict[str, Any]:
    return {
        "base": asdict(merged.base),
        "base_weights": merged.base_weights,
        "adapter": {"path": str(merged.source), "sha256": adapter_digest(merged.source)},
        "dtype": _dtype_name(merged.config.dtype),
    }


def _dtype_name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def _write_weights(merged: MergedCheckpoint, folder: Path, limit: int) -> tuple[int, int]:
    """Write the weight files, and an index if there are several. Returns the number of files and of bytes."""
    plan = merged.plan(limit)
    places: dict[str, str] = {}
    for i, shard in enumerate(merged.shards(limit), 1):
        file = WEIGHTS if len(plan) == 1 else f"model-{i:05d}-of-{len(plan):05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        places.update(dict.fromkeys(shard, file))
    size = sum(merged.bytes_of(name) for name in places)
    if len(plan) > 1:
        parameters = sum(torch.Size(merged.shape_of(name)).numel() for name in places)
        index = {"metadata": {"total_parameters": parameters, "total_size": size}, "weight_map": places}
        write_text(folder / INDEX, json.dumps(index, indent=2, sort_keys=True) + "\n")
    return len(plan), size


def _write_config(merged: MergedCheckpoint, folder: Path) -> None:
    """Write config.json: the base's own with the changes, so that a client finds every key that the base has."""
    tree = merged.config.to_diff_dict() if merged.folder is None else read_json(merged.folder / "config.json")
    kept = {key: value for key, value in tree.items() if key not in NOT_KEPT}
    kept |= {
        "architectures": merged.config.architectures,
        "dtype": _dtype_name(merged.config.dtype),
        "torch_dtype": _dtype_name(merged.config.dtype),  # its name in releases before transformers 4.56
        "tie_word_embeddings": merged.config.tie_word_embeddings,
        **_rope(merged.config),
    }
    write_text(folder / "config.json", json.dumps(kept, indent=2, sort_keys=True, ensure_ascii=False) + "\n")
    file_mode = (folder / "config.json").stat().st_mode & 0o777
    for file in folder.glob("*.safetensors"):
        file.chmod(file_mode)  # safetensors writes files that only the owner can read


def _rope(config: ModelConfig) -> dict[str, Any]:
    """The keys of the rotary embedding, both for transformers 5 and for older releases, llama.cpp and vLLM."""
    rope = dict(config.rope_parameters or {})
    both = {
        "rope_parameters": rope,
        "rope_theta": rope["rope_theta"],
        "partial_rotary_factor": rope.get("partial_rotary_factor", 1.0),
    }
    if rope.get("rope_type", "default") == "default":
        return {**both, "rope_scaling": None}
    if not is_fused(config):
        return {**both, "rope_scaling": {key: value for key, value in rope.items() if key != "rope_theta"}}
    if "long_factor" not in rope:  # a kind of rotary embedding that only transformers 5 has for Phi-3
        return both
    factors = {key: rope[key] for key in ("short_factor", "long_factor")}
    return {**both, "rope_scaling": {"type": "longrope", **factors}}


def _copy_tokenizer_model(merged: MergedCheckpoint, folder: Path) -> None:
    source = Path(merged.tokenizer.name_or_path) / TOKENIZER_MODEL
    if source.is_file() and not (folder / TOKENIZER_MODEL).exists():
        shutil.copyfile(source, folder / TOKENIZER_MODEL)
