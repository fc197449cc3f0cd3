"""Forward and backward of one step of made-up tokens as one measurement, by either engine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch

from benchmarks.products import Beside
from benchmarks.whole_run import LORA


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
    products: bool = False,
) -> dict[str, Any]:
    """Forward and backward over `chats` conversations of `length` tokens, the first `shared` of them the same.

    Args:
        engine: fast, plain (transformers and PEFT), or compiled (plain under torch.compile).
        labelled: tokens at each end that are trained on; None is all.
        rounds: steps that count, after a first one that does not; with 0 the first counts.
        attention_apart: one more step, under the profiler, says what share of its time attention takes.
        products: `share_of_peak` is the median of the rounds' shares of the best rate of products beside each.
    """
    from peft import LoraConfig, get_peft_model

    from phinetune.checkpoints.load import load_base
    from phinetune.config.model import ModelSection
    from phinetune.engine.kept_memory import kept_memory
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
    times, beside = [], Beside(dtype) if products else None
    with kept_memory(torch.device("cpu")) if engine == "fast" else nullcontext():
        for _ in range(rounds + 1):
            for p in trained:
                p.grad = None
            if beside:
                beside.begin()
            start = time.perf_counter()
            loss().backward()
            times.append(time.perf_counter() - start)
            if beside:
                beside.end()
        apart = {"attention_share": _attention_share(loss)} if attention_apart else {}
    counted = chats * (length if labelled is None else labelled)
    flop = useful(loaded.model.config, chats * length, counted, chats * pairs_seen(loaded.model.config, length))
    if beside:
        apart |= _shares(flop, times, beside)
    return {**apart, "tokens": chats * length, "seconds": statistics.median(times[1:] or times), "useful_flop": flop}


def _shares(flop: float, times: list[float], beside: Beside) -> dict[str, float]:
    """The share of the peak of the rounds that count, and the rate that it is a share of."""
    shares = [flop / seconds / rate for seconds, rate in zip(times, beside.rates, strict=True)]
    rate = statistics.median(beside.rates[1:] or beside.rates)
    return {"share_of_peak": statistics.median(shares[1:] or shares), "product_flop_per_s": rate}


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
