"""Forward and backward of one step of made-up tokens as one measurement, by either engine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.products import Products
from benchmarks.whole_run import LORA


@dataclass
class Ready:
    """A model whose steps can be timed.

    Attributes:
        loss: of the rows.
        trained: the adapter's parameters.
        kept: whether the engine keeps memory between steps.
        flop: `useful` ones of a step.
    """

    loss: Callable[[], torch.Tensor]
    trained: list[torch.nn.Parameter]
    kept: bool
    flop: float

    def seconds(self) -> float:
        """Those of one step."""
        for p in self.trained:
            p.grad = None
        start = time.perf_counter()
        self.loss().backward()
        return time.perf_counter() - start


def step(model: str, engine: str, chats: int, length: int, dtype: str, rounds: int = 3, **more: Any) -> dict[str, Any]:
    """Forward and backward over `chats` conversations of `length` tokens; `more` is as in `ready`.

    Args:
        rounds: steps that count, after a first one that does not; with 0 the first counts.
    """
    one = ready(model, engine, chats, length, dtype, **more)
    with kept(one):
        times = [one.seconds() for _ in range(rounds + 1)]
    return {"tokens": chats * length, "seconds": statistics.median(times[1:] or times)}


def paired(
    model: str, engines: Sequence[str], chats: int, length: int, dtype: str, rounds: int = 3
) -> dict[str, dict[str, dict[str, Any]]]:
    """Steps of several engines in turn, products between them, in one process. The last engine is the one looked at.

    Each figure is the median of the rounds: `share_of_peak` of shares of the products right before and after a step,
    `times` of its seconds over those of the last engine in the same round. A first round does not count.
    """
    made = {name: ready(model, name, chats, length, dtype, memory="auto") for name in engines}
    product = Products(dtype)
    times: dict[str, list[float]] = {name: [] for name in engines}
    shares: dict[str, list[float]] = {name: [] for name in engines}
    for _ in range(rounds + 1):
        rates = [product.rate()]
        for name, one in made.items():
            with kept(one):
                times[name].append(one.seconds())
            rates.append(product.rate())
            shares[name].append(one.flop / times[name][-1] / statistics.mean(rates[-2:]))
    last = engines[-1]
    found = {
        name: {
            "tokens": chats * length,
            "seconds": statistics.median(times[name][1:]),
            "share_of_peak": statistics.median(shares[name][1:]),
            "times": statistics.median(a / b for a, b in zip(times[name][1:], times[last][1:], strict=True)),
        }
        for name in engines
    }
    with kept(made[last]):
        found[last]["attention_share"] = _attention_share(made[last].loss)
    return {"engines": found}


def kept(one: Ready) -> AbstractContextManager[Any]:
    """Where a step runs: with kept memory, if its engine keeps memory."""
    from phinetune.engine.kept_memory import kept_memory

    return kept_memory(torch.device("cpu")) if one.kept else nullcontext()


def ready(
    model: str,
    engine: str,
    chats: int,
    length: int,
    dtype: str,
    *,
    shared: int = 0,
    sharing: bool = True,
    labelled: int | None = None,
    memory: str | int = "none",
) -> Ready:
    """A model and made-up rows.

    Args:
        engine: fast, plain (transformers and PEFT), or compiled (plain under torch.compile).
        shared: tokens with which all conversations begin.
        labelled: tokens at each end that are trained on; None is all.
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
    counted = chats * (length if labelled is None else labelled)
    flop = useful(loaded.model.config, chats * length, counted, chats * pairs_seen(loaded.model.config, length))
    return Ready(loss, [p for p in peft.parameters() if p.requires_grad], engine == "fast", flop)


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
