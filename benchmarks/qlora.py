"""QLoRA and merging on the whole of Phi-3 mini, in fresh processes, beside TRL with PEFT and bitsandbytes.

    python -m benchmarks.qlora [--only whole,layers,merge] [--dtype float32] [--shape random:phi-3-mini] [--quick]

Writes benchmarks/results/qlora/*.json and qlora.md. The weights are random, of the true shape, and lie in float16 in
several files as the hub has them: 7.6 GB, written once into phinetune's cache folder (`PHINETUNE_HOME`); merging takes
twice that beside it for a while. `--dtype` is what is computed in. Memory is resident memory at its largest, of loading
(up to the first forward) and of training apart.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import random
import shutil
import string
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from rich.console import Console
from safetensors.torch import save_file
from torch import Tensor
from transformers import Phi3Config, Phi3ForCausalLM

from benchmarks.fresh import measure
from benchmarks.machine import machine
from benchmarks.store import Book, Part, Row
from benchmarks.train import HEADINGS, cells
from benchmarks.whole_run import LORA
from phinetune.checkpoints import random_shapes, starter
from phinetune.checkpoints.adapters import ADAPTER_WEIGHTS, BASE_FILE
from phinetune.checkpoints.load import Base
from phinetune.checkpoints.target_modules import linear_layers
from phinetune.checkpoints.weight_files import INDEX, fingerprint
from phinetune.files import staged_folder

STORED = torch.float16  # the dtype of the files: a processor without bfloat16 reads it, too
SHARD_BYTES = 2_000_000_000
CHATS, LENGTH = 4, 256  # a step: 1,024 tokens
FEW_LAYERS = 4
# TRL's own default saves memory by recomputation; one row at a time needs none of it.
TRL_SETTINGS: dict[str, dict[str, Any]] = {
    f"TRL + PEFT + bitsandbytes, {CHATS} rows at a time, checkpointing": {"batch": CHATS, "checkpointing": True},
    f"TRL + PEFT + bitsandbytes, 1 row at a time, {CHATS} a step": {"batch": 1, "accumulate": CHATS},
}
# As it is, keeping what fits the free memory; and in less memory, down to the least it can.
OURS: dict[str, dict[str, Any]] = {
    "auto": {},
    "26 of 32 layers recomputed": {"activation_memory": 26},
    "everything recomputed": {"activation_memory": "all"},
}


def whole(config: Phi3Config, dtype: str, quick: bool) -> list[Row]:
    """The whole shape in NF4, 1,024 tokens a step, beside TRL on the same rows."""
    folder = saved(config)
    common = {"model": str(folder), **made_rows(config, 1 if quick else 2), "dtype": dtype, "quantization": "nf4"}
    found = [{"what": name, **measure("trl", **common, **setting)} for name, setting in TRL_SETTINGS.items()]
    default, best = found[0].get("tokens_per_s"), max(row.get("tokens_per_s", 0.0) for row in found)
    found += [
        {"what": f"phinetune, QLoRA, {what}", **measure("phinetune", **common, batch=CHATS, engine=engine)}
        for what, engine in OURS.items()
    ]
    for row in found:
        row["times_default"] = row.get("tokens_per_s", 0.0) / default if default else None
    for row in found[len(TRL_SETTINGS) :]:
        row["times TRL at its best"] = row.get("tokens_per_s", 0.0) / best if best else 0.0
    return found


def layers(config: Phi3Config, dtype: str, quick: bool) -> list[Row]:
    """Four layers of it: QLoRA beside this project's engine unquantised in the same dtype, which fits at that depth."""
    few = copy.deepcopy(config)
    few.num_hidden_layers = min(FEW_LAYERS, config.num_hidden_layers)
    common = {"model": str(saved(few)), **made_rows(few, 2 if quick else 8), "dtype": dtype, "engine": {}}
    found = [
        {
            "what": f"{few.num_hidden_layers} layers, {name}",
            **measure("phinetune", **common, batch=CHATS, quantization=kind),
        }
        for kind, name in (("none", f"unquantised, {dtype}"), ("nf4", f"QLoRA, products in {dtype}"))
    ]
    if all("tokens_per_s" in row for row in found):
        found[1]["times unquantised"] = found[1]["tokens_per_s"] / found[0]["tokens_per_s"]
    return found


def merge(config: Phi3Config, dtype: str, quick: bool) -> list[Row]:
    """An adapter of rank 16 on every linear layer merged into the whole shape, beside a plain copy of the base."""
    folder = saved(config)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix="merging-") as place:
        adapter = write_adapter(config, folder, Path(place) / "adapter")
        found = []
        for kind, name in (("copy", "plain copy"), ("copy", "plain copy, again"), ("merge", "phinetune merge")):
            out = Path(place) / "out"
            found.append({"what": name, **measure(kind, adapter=str(adapter), base=str(folder), out=str(out))})
            shutil.rmtree(out, ignore_errors=True)
    if "seconds" in found[1] and "seconds" in found[2]:  # the first copy may have had to read from the disk
        found[2]["times a copy"] = found[2]["seconds"] / found[1]["seconds"]
    return found


PARTS: dict[str, Callable[[Phi3Config, str, bool], list[Row]]] = {"whole": whole, "layers": layers, "merge": merge}


def meaning(name: str, part: Part) -> str:
    """What a part of this benchmark is."""
    return PARTS[name].__doc__ or ""


BOOK = Book("qlora", "QLoRA and merging on Phi-3 mini's shape", HEADINGS, cells, meaning)


def saved(config: Phi3Config, device: str = "cpu") -> Path:
    """A checkpoint of random weights of that shape, drawn on `device`, written shard by shard unless it is there."""
    shape = hashlib.sha256(config.to_json_string().encode()).hexdigest()[:8]
    target = (
        starter.cache_folder()
        / f"bench-{config.num_hidden_layers}-layers-{shape}{'' if device == 'cpu' else '-' + device}"
    )
    if target.is_dir():
        return target
    with staged_folder(target) as folder:
        places: dict[str, str] = {}
        for i, shard in enumerate(_shards(config, device), 1):
            file = f"model-{i:05d}.safetensors"
            save_file(shard, folder / file, metadata={"format": "pt"})
            places |= dict.fromkeys(shard, file)
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
        stored = copy.deepcopy(config)
        stored.dtype, stored.architectures = STORED, ["Phi3ForCausalLM"]
        stored.save_pretrained(folder)
        random_shapes.byte_tokenizer(config.vocab_size).save_pretrained(folder)
    return target


def _shards(config: Phi3Config, device: str) -> Iterator[dict[str, Tensor]]:
    """Weights as a new model's: normal, norms of ones; one shard in memory at a time."""
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in Phi3ForCausalLM(config).state_dict().items()}
    draw = torch.Generator(device).manual_seed(0)
    shard: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        if "norm" in name:
            tensor = torch.ones(shape, dtype=STORED)
        else:
            drawn = torch.randn(shape, generator=draw, device=device) * config.initializer_range
            tensor = drawn.to(STORED).cpu()
        if shard and sum(t.nbytes for t in shard.values()) + tensor.nbytes > SHARD_BYTES:
            yield shard
            shard = {}
        shard[name] = tensor
    yield shard


def made_rows(config: Phi3Config, steps: int, chats: int = CHATS, length: int = LENGTH) -> dict[str, Any]:
    """`steps` steps of `chats` made-up rows of `length` tokens each, so that nobody pads: a letter is a token here."""
    tokenizer = random_shapes.byte_tokenizer(config.vocab_size)
    chat = [{"role": "user", "content": "x"}, {"role": "assistant", "content": ""}]
    letters = length - len(tokenizer(tokenizer.apply_chat_template(chat, tokenize=False))["input_ids"])
    draw = random.Random(1)
    made = [
        {"instruction": "x", "input": "", "output": "".join(draw.choices(string.ascii_lowercase, k=letters))}
        for _ in range(chats * steps)
    ]
    file = Path(tempfile.mkdtemp()) / "rows.json"
    file.write_text(json.dumps(made))
    return {"data": str(file), "rows": len(made)}


def write_adapter(config: Phi3Config, base: Path, folder: Path) -> Path:
    """An adapter of drawn A and B on every linear layer, as PEFT has it, recorded as one of `base`."""
    with torch.device("meta"):
        found = linear_layers(Phi3ForCausalLM(config))
    draw = torch.Generator().manual_seed(2)
    tensors = {}
    for name, layer in found.items():
        for part, shape in (("A", (LORA["r"], layer.in_features)), ("B", (layer.out_features, LORA["r"]))):
            tensors[f"base_model.model.{name}.lora_{part}.weight"] = torch.randn(shape, generator=draw) * 0.01
    targets = sorted({name.rsplit(".", 1)[-1] for name in found})
    LoraConfig(**{**LORA, "target_modules": targets, "base_model_name_or_path": str(base)}).save_pretrained(folder)
    save_file(tensors, folder / ADAPTER_WEIGHTS)
    (folder / BASE_FILE).write_text(Base(str(base), None, fingerprint(base)).to_json())
    return folder


def main() -> None:
    """Run the parts, print a table after each, write the results."""
    from phinetune.checkpoints.device import has_native_bf16

    cli = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    cli.add_argument("--only", default=",".join(PARTS))
    cli.add_argument("--dtype", default="bfloat16" if has_native_bf16(torch.device("cpu")) else "float32")
    cli.add_argument("--shape", default="random:phi-3-mini", help="as model.path takes it, for trying this out")
    cli.add_argument("--quick", action="store_true", help="fewer steps")
    options = cli.parse_args()
    console = Console()
    config = random_shapes.parse_shape(options.shape)
    for name in options.only.split(","):
        rows = PARTS[name](config, options.dtype, options.quick)
        console.print(BOOK.table(name, rows))
        written = BOOK.keep({name: {"machine": machine(options.dtype), "rows": rows}})
    console.print(f"Wrote {' and '.join(map(str, written))}")


if __name__ == "__main__":
    main()
