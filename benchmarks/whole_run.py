"""A whole run as one measurement: by TRL with PEFT, or by this project, with its steps and the memory of its phases."""

from __future__ import annotations

import contextlib
import json
import resource
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

LORA = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
TRAINING: dict[str, Any] = {
    "num_train_epochs": 1,
    "learning_rate": 2e-4,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 5,
    "logging_steps": 1,
    "save_strategy": "no",
    "max_length": 1024,
    "seed": 0,
    "use_cpu": True,
}


class Steps:
    """The moments at which optimizer steps ended, by a hook of torch's; the device has then computed all of them."""

    def __init__(self, device: str) -> None:
        self.device, self.ended = torch.device(device), list[float]()

    def __enter__(self) -> Steps:
        from torch.optim.optimizer import register_optimizer_step_post_hook

        self.hook = register_optimizer_step_post_hook(lambda *_: self._end())
        return self

    def __exit__(self, *_: object) -> None:
        self.hook.remove()

    def _end(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.ended.append(time.perf_counter())

    def found(self) -> dict[str, float]:
        """The median time of a step once the first two are done, and on CUDA the memory that torch held at most."""
        later = [after - before for before, after in zip(self.ended[1:], self.ended[2:], strict=False)]
        found = {"step_seconds": statistics.median(later)} if later else {}
        if self.device.type == "cuda":
            found["device_gb"] = torch.cuda.max_memory_allocated(self.device) / 1e9
        return found


PEAKS: dict[str, float] = {}  # resident memory of the phases that have ended, in GB


def end_phase(name: str) -> None:
    """Keep the largest resident memory of the phase that ends here, and count anew for the next."""
    if name in PEAKS:
        return
    PEAKS[name] = peak_gb()
    with contextlib.suppress(OSError):  # not Linux, or not allowed: the next phase's peak is then at least this one's
        Path("/proc/self/clear_refs").write_text("5")


def peak_gb() -> float:
    """The largest resident memory since the last phase, in GB."""
    status = Path("/proc/self/status")
    for line in status.read_text().splitlines() if status.is_file() else []:
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024 / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def trl(
    model: str,
    data: str,
    rows: int,
    batch: int,
    dtype: str,
    checkpointing: bool = False,
    packing: bool = False,
    compile: bool = False,
    accumulate: int = 1,
    quantization: str = "none",
    device: str = "cpu",
    liger: bool = False,
) -> dict[str, Any]:
    """TRL on the first rows of `data`, a JSON list of Alpaca rows."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    from phinetune.checkpoints.quantize import quantization_config

    made = getattr(torch, dtype)
    held = {"quantization_config": quantization_config(quantization, made)} if quantization != "none" else {}
    held |= {"device_map": {"": 0}} if device == "cuda" else {}
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=made, attn_implementation="sdpa", **held)
    end_phase("load_gb")
    trainer = SFTTrainer(
        model=loaded,
        args=SFTConfig(
            tempfile.mkdtemp(),
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulate,
            packing=packing,
            gradient_checkpointing=checkpointing,
            torch_compile=compile,
            bf16=dtype == "bfloat16",
            report_to=[],
            disable_tqdm=True,
            use_liger_kernel=liger,
            **{**TRAINING, "use_cpu": device == "cpu"},
        ),
        train_dataset=Dataset.from_list(_chats(data, rows)),
        processing_class=AutoTokenizer.from_pretrained(model),
        peft_config=LoraConfig(**LORA),
    )
    tokens = sum(len(ids) for ids in trainer.train_dataset["input_ids"])
    start = time.perf_counter()
    with Steps(device) as steps:
        trainer.train()
    seconds = time.perf_counter() - start
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    found = {"tokens": tokens, "seconds": seconds, "first_loss": losses[0], "last_loss": losses[-1]}
    return found | steps.found()


def _chats(data: str, rows: int) -> list[dict[str, Any]]:
    read = json.loads(Path(data).read_text())[:rows]
    asked = [row["instruction"] + ("\n" + row["input"] if row["input"] else "") for row in read]
    return [
        {
            "prompt": [{"role": "user", "content": question}],
            "completion": [{"role": "assistant", "content": row["output"]}],
        }
        for question, row in zip(asked, read, strict=True)
    ]


def phinetune(
    model: str,
    data: str,
    rows: int,
    batch: int,
    dtype: str,
    engine: dict[str, Any],
    quantization: str = "none",
    device: str = "cpu",
) -> dict[str, Any]:
    """A run of this project on the same rows. `overhead`: share of the time that is not forward to optimizer."""
    from peft import PeftModel
    from torch.nn.modules.module import register_module_forward_pre_hook

    from phinetune.config.run import make_config
    from phinetune.training.prepare import prepare_run, settle
    from phinetune.training.run import open_place, train_run

    began: list[float] = []

    def begin(module: torch.nn.Module, _: Any) -> None:
        if isinstance(module, PeftModel):
            end_phase("load_gb")
            began.append(time.perf_counter())

    folder = Path(tempfile.mkdtemp()) / "run"
    training = {**TRAINING, "output_dir": str(folder), "per_device_train_batch_size": batch}
    training["use_cpu"] = device == "cpu"
    config = make_config(
        {
            "model": {"path": model, "dtype": dtype, "device": device, "quantization": quantization},
            "data": {"train": data, "limit": rows},
            "engine": engine,
            "peft_config": LORA,
            "training_config": training,
        }
    )
    prepared, place = prepare_run(settle(config)), open_place(config)
    hook = register_module_forward_pre_hook(begin)
    with Steps(device) as steps:
        trained = train_run(prepared, place)
    hook.remove()
    losses = [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    inside = sum(end - start for start, end in zip(began, steps.ended, strict=True))
    return {
        **steps.found(),
        "tokens": trained.summary["tokens"],
        "seconds": trained.summary["seconds"],
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "overhead": 1 - inside / (steps.ended[-1] - began[0]),
    }
