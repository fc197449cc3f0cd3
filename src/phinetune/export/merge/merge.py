"""A run merged into its base and written as a plain transformers checkpoint, shard by shard.

    phinetune merge runs/demo --out merged

What is written needs neither PEFT nor phinetune. `merged.json` beside the weights says what was merged into what.
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
from transformers import Phi3Config

from phinetune.checkpoints.load import INDEX, WEIGHTS
from phinetune.errors import ModelError
from phinetune.export.hub.merged_card import write_merged_card
from phinetune.export.merge.merged import (
    MERGED_FILE,
    OUTPUT_DTYPES,
    PLAIN,
    SHARD_BYTES,
    MergedCheckpoint,
    adapter_digest,
    open_merged,
)
from phinetune.files import staged_folder, write_text
from phinetune.run_folder import CARD

TOKENIZER_MODEL = "tokenizer.model"  # sentencepiece's file, which transformers 5 reads no more and llama.cpp does
# Keys of a base's config.json that say nothing about the merged model, or would make clients run or expect other code.
NOT_KEPT = ("auto_map", "_name_or_path", "torch_dtype", "quantization_config", "transformers_version")


@dataclass(frozen=True)
class Merge:
    """A finished merge.

    Attributes:
        path: the folder written.
        record: what merged.json says.
        tensors: how many the adapter changed, and how many there are.
        files: of the weights.
        size: bytes of the weights.
        untied: whether the base's embedding and head are one and the merged model's are two.
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
        how = "" if self.record["base_weights"] == PLAIN else f", quantised to {self.record['base_weights']} and back"
        changed, count = self.tensors
        lines = [
            f"Merged {self.record['adapter']['path']} into {base}{how}: {changed} of {count} tensors changed, "
            f"products in float32, written as {self.record['dtype']}",
        ]
        if self.untied:
            lines.append("The adapter changes the embedding or the output head alone, so they are tied no more")
        size = f"{self.size / 1e9:.2f} GB" if self.size >= 1e9 else f"{self.size / 1e6:.1f} MB"
        files = "one file" if self.files == 1 else f"{self.files} files"
        return [*lines, f"Wrote {self.path}: {size} of weights in {files}, tokenizer, {MERGED_FILE} and a model card"]


def merge_run(
    run: str | Path,
    out: str | Path,
    *,
    dtype: str | torch.dtype | None = None,
    base: str = PLAIN,
    shard_bytes: int = SHARD_BYTES,
) -> Merge:
    """Merge a run, one of its checkpoints or an adapter folder into its base, and write the model to `out`.

    Args:
        out: a folder that is not there yet, or empty; it appears whole or not at all.
        dtype, base: see `open_merged`.
        shard_bytes: largest size of a weights' file, and what is held in memory beside the adapter.

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
    """Add held-out losses (nats a labelled token, by `base`, `adapter` and `merged`) to the record and the card."""
    merge.record["held_out_loss"] = dict(losses)
    write_text(merge.path / MERGED_FILE, json.dumps(merge.record, indent=2, ensure_ascii=False) + "\n")
    write_text(merge.path / CARD, write_merged_card(merge.path.resolve().name, merge.record))


def _check_free(out: Path) -> None:
    if out.is_dir() and not out.is_symlink() and not any(out.iterdir()):
        return
    if (out / MERGED_FILE).is_file():
        raise ModelError(f"{out}: holds a merged model already; nothing is overwritten, so name another folder")
    if os.path.lexists(out):
        raise ModelError(f"{out}: is there already; nothing is overwritten, so name another folder")


def _record(merged: MergedCheckpoint) -> dict[str, Any]:
    return {
        "base": asdict(merged.base),
        "base_weights": merged.base_weights,
        "adapter": {"path": str(merged.source), "sha256": adapter_digest(merged.source)},
        "dtype": _name(merged.config.dtype),
    }


def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def _write_weights(merged: MergedCheckpoint, folder: Path, limit: int) -> tuple[int, int]:
    """The weights' files, and the index where there are several; how many files and bytes."""
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
    """config.json: the base's own, so that no client misses a key it knows from there, with what has changed."""
    tree = merged.config.to_diff_dict() if merged.folder is None else _read(merged.folder / "config.json")
    kept = {key: value for key, value in tree.items() if key not in NOT_KEPT}
    kept |= {
        "architectures": merged.config.architectures,
        "dtype": _name(merged.config.dtype),
        "torch_dtype": _name(merged.config.dtype),  # as every release before transformers 4.56 calls it
        "tie_word_embeddings": merged.config.tie_word_embeddings,
        **_rope(merged.config),
    }
    write_text(folder / "config.json", json.dumps(kept, indent=2, sort_keys=True, ensure_ascii=False) + "\n")
    file_mode = (folder / "config.json").stat().st_mode & 0o777
    for file in folder.glob("*.safetensors"):
        file.chmod(file_mode)  # safetensors lets the owner alone read it


def _rope(config: Phi3Config) -> dict[str, Any]:
    """The rotary embedding as transformers 5 writes it and as all before it (and llama.cpp, vLLM) read it."""
    rope = dict(config.rope_parameters or {})
    both = {
        "rope_parameters": rope,
        "rope_theta": rope["rope_theta"],
        "partial_rotary_factor": rope.get("partial_rotary_factor", 1.0),
    }
    if rope.get("rope_type", "default") == "default":
        return {**both, "rope_scaling": None}
    if "long_factor" not in rope:  # a kind that only transformers 5 has for Phi-3
        return both
    factors = {key: rope[key] for key in ("short_factor", "long_factor")}
    return {**both, "rope_scaling": {"type": "longrope", **factors}}


def _read(file: Path) -> dict[str, Any]:
    tree: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return tree


def _copy_tokenizer_model(merged: MergedCheckpoint, folder: Path) -> None:
    source = Path(merged.tokenizer.name_or_path) / TOKENIZER_MODEL
    if source.is_file() and not (folder / TOKENIZER_MODEL).exists():
        shutil.copyfile(source, folder / TOKENIZER_MODEL)
