"""One measurement in a process of its own: `python -m benchmarks.worker KIND JSON` prints one JSON line.

Kinds: `trl` (TRL's SFTTrainer with PEFT), `phinetune` (a whole run of this project), `step` (forward and backward of
one step of made-up tokens, by either engine), `gemm` (the best rates of matrix products), `generate` (greedy answers
to prompts, by transformers or by this project), `llama` (by llama.cpp), `merge` (an adapter into its base), `copy`
(that base's folder).
"""

from __future__ import annotations

import contextlib
import json
import resource
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
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
    PEAKS[name] = _peak_gb()
    with contextlib.suppress(OSError):  # not Linux, or not allowed: the next phase's peak is then at least this one's
        Path("/proc/self/clear_refs").write_text("5")


def _peak_gb() -> float:
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


def step(
    model: str,
    engine: str,
    chats: int,
    length: int,
    dtype: str,
    shared: int = 0,
    sharing: bool = True,
    labelled: int | None = None,
    rounds: int = 3,
    memory: str | int = "none",
    attention_apart: bool = False,
) -> dict[str, Any]:
    """Forward and backward over `chats` conversations of `length` tokens, the first `shared` of them the same.

    Args:
        engine: fast, plain (transformers and PEFT), or compiled (plain under torch.compile).
        labelled: tokens at each end that are trained on; None is all.
        rounds: steps that count, after a first one that does not; with 0 the first counts.
        attention_apart: one more step, under the profiler, says what share of its time attention takes.
    """
    from peft import LoraConfig, get_peft_model

    from phinetune.checkpoints.load import load_base
    from phinetune.config.model import ModelSection
    from phinetune.engine.lora_layers import use_fused_layers

    loaded = load_base(ModelSection(path=model, dtype=dtype, device="cpu"), fast=engine == "fast")
    lora = LoraConfig(**LORA)
    peft = get_peft_model(loaded.model, use_fused_layers(lora, loaded.model) if engine == "fast" else lora).train()
    rows = _made_up(chats, length, shared, labelled, loaded.model.config.vocab_size - 64)
    if engine == "fast":
        loss = _fast_loss(peft, rows, sharing, memory)
    else:
        loss = _plain_loss(torch.compile(peft) if engine == "compiled" else peft, rows, dtype)
    trained = [p for p in peft.parameters() if p.requires_grad]
    times = []
    for _ in range(rounds + 1):
        for p in trained:
            p.grad = None
        start = time.perf_counter()
        loss().backward()
        times.append(time.perf_counter() - start)
    counted = chats * (length if labelled is None else labelled)
    return {
        **({"attention_share": _attention_share(loss)} if attention_apart else {}),
        "tokens": chats * length,
        "seconds": statistics.median(times[1:] or times),
        "useful_flop": useful(
            loaded.model.config, chats * length, counted, chats * pairs_seen(loaded.model.config, length)
        ),
    }


def _attention_share(loss: Callable[[], torch.Tensor]) -> float:
    """Of a step's time."""
    from phinetune.engine.kernels.attention import PROFILED

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        start = time.perf_counter()
        loss().backward()
        seconds = time.perf_counter() - start
    return sum(event.cpu_time_total for event in seen.key_averages() if event.key == PROFILED) / 1e6 / seconds


def pairs_seen(config: Any, length: int) -> int:
    """(query, key) pairs of a conversation that see each other, its sliding window counted."""
    window = min(length, getattr(config, "sliding_window", None) or length)
    return window * (window + 1) // 2 + (length - window) * window


def _made_up(chats: int, length: int, shared: int, labelled: int | None, top: int) -> list[Any]:
    """Conversations of random tokens below `top`; see `step`."""
    from phinetune.engine.examples import Encoded

    torch.manual_seed(0)
    begin = torch.randint(3, top, (shared,)).tolist()
    quiet = 0 if labelled is None else length - labelled
    rows = [begin + torch.randint(3, top, (length - shared,)).tolist() for _ in range(chats)]
    return [Encoded(ids, [-100] * quiet + ids[quiet:]) for ids in rows]


def _fast_loss(peft: Any, rows: list[Any], sharing: bool, memory: str | int) -> Callable[[], torch.Tensor]:
    """This project's loss of the rows, packed."""
    from phinetune.config.engine import EngineSection
    from phinetune.engine.fast_engine import FastEngine
    from phinetune.engine.packing import pack

    setting = EngineSection(activation_memory=memory).activation_memory
    FastEngine(setting, sharing, None, False).set_up(peft, torch.device("cpu"))
    batch = pack(rows, share=sharing)

    def loss() -> torch.Tensor:
        out = peft(**batch)
        return out.nll / out.count  # type: ignore[no-any-return]

    return loss


def _plain_loss(run: Any, rows: list[Any], dtype: str) -> Callable[[], torch.Tensor]:
    """transformers' loss of the rows, which are of one length."""
    ids, labels = torch.tensor([r.input_ids for r in rows]), torch.tensor([r.labels for r in rows])

    def loss() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            return run(input_ids=ids, labels=labels, use_cache=False).loss  # type: ignore[no-any-return]

    return loss


def useful(config: Any, tokens: int, labels: int, pairs: int) -> float:
    """Operations that a step cannot do without: products forward and backward, the head at labels, attention's.

    Args:
        pairs: (query, key) pairs that see each other.
    """
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attended = config.num_attention_heads * size
    qkv = attended + 2 * config.num_key_value_heads * size
    hidden, inner = config.hidden_size, config.intermediate_size
    layer = hidden * qkv + attended * hidden + 3 * hidden * inner
    # Attention: two products forward, four backward, 2 operations a multiplication each.
    attention = 12 * attended * pairs
    return config.num_hidden_layers * (4.0 * layer * tokens + attention) + 4.0 * hidden * config.vocab_size * labels


def generate(
    model: str,
    prompts: str,
    limit: int,
    dtype: str,
    way: str,
    batch: int | None = None,
    adapter: bool = True,
    endless: bool = False,
) -> dict[str, Any]:
    """Greedy answers to prompts, the model under a new LoRA unless told otherwise.

    Args:
        prompts: a JSON file, a list of lists of token ids.
        way: `transformers` (its own classes, `batch` prompts a call in the order of the file, padded to the left) or
            `phinetune` (`batch` prompts together; None: as memory allows).
        endless: no token ends an answer, so all have `limit` tokens.
    """
    from peft import LoraConfig, get_peft_model

    from phinetune.checkpoints.load import load_base
    from phinetune.config.model import ModelSection
    from phinetune.engine.generate import stop_set
    from phinetune.engine.lora_layers import use_fused_layers

    ours = way == "phinetune"
    loaded = load_base(ModelSection(path=model, dtype=dtype), fast=ours)
    answering: Any = loaded.model
    if adapter:
        lora = LoraConfig(**LORA)
        answering = get_peft_model(loaded.model, use_fused_layers(lora, loaded.model) if ours else lora).eval()
    asked: list[list[int]] = json.loads(Path(prompts).read_text())
    stops = set[int]() if endless else stop_set(answering)
    run = _by_phinetune if ours else _by_transformers
    run(answering, asked[:2], 2, batch, stops)  # what is set up once
    start = time.perf_counter()
    answers = run(answering, asked, limit, batch, stops)
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "tokens": sum(map(len, answers)), "answers": answers}


def _by_phinetune(
    model: Any, asked: list[list[int]], limit: int, batch: int | None, stops: set[int]
) -> list[list[int]]:
    from phinetune.engine.greedy_decode import decode

    core = model.get_base_model() if hasattr(model, "get_base_model") else model
    return decode(core, asked, stops=stops, limit=limit, rows=batch)


def _by_transformers(
    model: Any, asked: list[list[int]], limit: int, batch: int | None, stops: set[int]
) -> list[list[int]]:
    answers: list[list[int]] = []
    pad = model.generation_config.pad_token_id
    for first in range(0, len(asked), batch or len(asked)):
        part = asked[first : first + (batch or len(asked))]
        width = max(map(len, part))
        ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in part])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in part])
        out = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=limit,
            do_sample=False,
            pad_token_id=pad,
            eos_token_id=sorted(stops),
        )
        for row in out[:, width:].tolist():
            end = next((i + 1 for i, token in enumerate(row) if token in stops), len(row))
            answers.append(row[:end])
    return answers


def llama(gguf: str, prompts: str, limit: int) -> dict[str, Any]:
    """llama.cpp's greedy answers to all prompts at once, each of `limit` tokens, on a server in this process.

    Args:
        gguf: the model's file.
    """
    import urllib.request
    from concurrent.futures import ThreadPoolExecutor

    import xllamacpp

    asked: list[list[int]] = json.loads(Path(prompts).read_text())
    longest = max(map(len, asked)) + limit + 8
    params = xllamacpp.CommonParams()
    params.model.path, params.n_parallel, params.port = gguf, len(asked), 0
    params.n_ctx = len(asked) * (-(-longest // 256) * 256)
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = torch.get_num_threads()
    params.n_gpu_layers, params.verbosity = 0, 0
    server = xllamacpp.Server(params)

    def answer(ids: list[int], count: int) -> list[int]:
        body = {"prompt": ids, "n_predict": count, "temperature": 0, "return_tokens": True, "ignore_eos": True}
        request = urllib.request.Request(
            server.listening_address + "/completion",
            json.dumps({**body, "cache_prompt": False}).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request) as done:
            return list(json.load(done)["tokens"])

    answer(asked[0], 2)  # what is set up once
    start = time.perf_counter()
    with ThreadPoolExecutor(len(asked)) as pool:
        answers = list(pool.map(lambda ids: answer(ids, limit), asked))
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "tokens": sum(map(len, answers)), "answers": answers}


def gemm(dtype: str) -> dict[str, Any]:
    """The best rate of a matrix product seen in this dtype and in float32, in operations a second."""
    return {"flop_per_s": {name: _product_rate(getattr(torch, name)) for name in dict.fromkeys((dtype, "float32"))}}


def _product_rate(dtype: torch.dtype) -> float:
    best = 0.0
    for rows, inner, columns in ((2048, 3072, 9216), (2048, 2048, 2048), (1024, 8192, 3072)):
        a, b = torch.randn(rows, inner, dtype=dtype), torch.randn(columns, inner, dtype=dtype)
        for _ in range(5):
            start = time.perf_counter()
            torch.mm(a, b.t())
            best = max(best, 2.0 * rows * inner * columns / (time.perf_counter() - start))
    return best


def merge(adapter: str, base: str, out: str) -> dict[str, Any]:
    """The adapter merged into the base, in the dtype of the base's files, synced to disk."""
    from phinetune.exporting.merge.merge import merge_run

    del base
    start = time.perf_counter()
    made = merge_run(adapter, out)
    return {"seconds": time.perf_counter() - start, "bytes": made.size}


def copy(adapter: str, base: str, out: str) -> dict[str, Any]:
    """The base's folder copied, synced to disk as a merge is."""
    from phinetune.files import sync_tree

    del adapter
    start = time.perf_counter()
    shutil.copytree(base, out)
    sync_tree(Path(out))
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "bytes": sum(file.stat().st_size for file in Path(out).iterdir())}


KINDS = {
    "trl": trl,
    "phinetune": phinetune,
    "step": step,
    "gemm": gemm,
    "merge": merge,
    "copy": copy,
    "generate": generate,
    "llama": llama,
}


def main() -> None:
    """Run the kind named on the command line and print what it gave, with this process's peak memory."""
    torch.set_num_threads(2)
    result = KINDS[sys.argv[1]](**json.loads(sys.argv[2]))
    last = _peak_gb()
    if PEAKS:
        result |= {**PEAKS, "training_gb": last}
    result["peak_gb"] = max(last, *PEAKS.values()) if PEAKS else last
    print(json.dumps(result))


if __name__ == "__main__":
    main()
