"""Memory and time of a run on each model of the family, as the planner says."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias

from doc_pages.family import FAMILY, GIB, METHODS, Model, need, sizes
from doc_pages.filling import DOCS, table
from doc_pages.words import said
from phinetune.engine.activation_memory import Level

MACHINES = (8, 16, 24)  # GB of memory, of 2^30 bytes
SET_ASIDE = 1.5  # GB of it, for the program itself and the system
STEPS = (256, 512, 1024, 2048, 4096, 8192, 16384)  # tokens of a micro-batch that are tried
# Model, method, what was timed, tokens a second, and the machine.
Timed: TypeAlias = tuple[str, str, str, float, str]
SPEEDS = Path(__file__).with_name("speeds.json")  # written by `python tools/write_docs.py --measure`


def longest_step(model: Model, quantization: str, machine: int) -> tuple[int, int] | None:
    """The most tokens of a micro-batch that fit on a machine, of those in `STEPS`, and how many layers are then
    recomputed whole; None if not even the fewest fit.
    """
    free, found = int((machine - SET_ASIDE) * GIB), None
    for tokens in STEPS:
        parts, levels = need(model, quantization, tokens, "auto", free)
        if parts.total <= free:
            found = (tokens, sum(level is Level.LAYER for level in levels))
    return found


def memory_fits(language: str) -> str:
    """What fits on 8, 16 and 24 GB."""
    head = ["model", "method", *(f"{machine} GB" for machine in MACHINES)]
    rows = []
    for model in FAMILY:
        for method, quantization in METHODS.items():
            cells = [_fits(longest_step(model, quantization, machine)) for machine in MACHINES]
            rows.append([model.name, method, *cells])
    return table([said(word, language) for word in head], rows, numbers=(2, 3, 4))


def _fits(found: tuple[int, int] | None) -> str:
    return f"{found[0]:,}" if found else "–"


def memory_parts(language: str) -> str:
    """The parts of the peak at 1,024 tokens a step, with as little kept as can be."""
    head = ("model", "method", "weights", "adapter and AdamW", "activations", "peak")
    rows = []
    for model in FAMILY:
        for method, quantization in METHODS.items():
            parts, _ = need(model, quantization, 1024, "all", 0)
            numbers = (
                parts.weights,
                parts.adapter + parts.optimizer,
                parts.activations + max(parts.layer, parts.logits),
                parts.total,
            )
            rows.append([model.name, method, *(f"{number / GIB:.1f}" for number in numbers)])
    return table([said(word, language) for word in head], rows, numbers=(2, 3, 4, 5))


def memory_models(language: str) -> str:
    """The shapes, their checkpoints and their sizes."""
    head = ("model", "checkpoints", "parameters", "LoRA's parameters at rank 16")
    rows = [
        [
            model.name,
            ", ".join(f"`{name}`" for name in model.hub),
            f"{(sizes(model).parameters - sizes(model).trainable) / 1e9:.2f} G",
            f"{sizes(model).trainable / 1e6:.1f} M",
        ]
        for model in FAMILY
    ]
    return table([said(word, language) for word in head], rows, numbers=(2, 3))


def memory_time(language: str) -> str:
    """Tokens a second, and what a thousand chats take: of whole runs that were measured, and of plans where
    `SPEEDS` has them.
    """
    head = ("model", "method", "what was timed", "tokens/s", "hours for 1,000 chats of 300 tokens, 3 epochs")
    made = [*_whole_runs(), *_planned()]
    rows = [
        [model, method, said(what, language), f"{rate:.1f}", f"{900_000 / rate / 3600:.0f}"]
        for model, method, what, rate, _ in made
    ]
    where = list(dict.fromkeys(machine for *_, machine in made))
    lines = [said("Measured on {machine}.", language).replace("{machine}", one) for one in where]
    return "\n\n".join([table([said(word, language) for word in head], rows, numbers=(3, 4)), *lines])


def _whole_runs() -> Iterator[Timed]:
    """The whole of Phi-3 mini in bfloat16, 1,024 tokens a step, as benchmarks.train and benchmarks.qlora ran it."""
    wanted = (("train", "LoRA", "Phi-3 mini, 4 × 256 tokens, auto"), ("qlora", "QLoRA", "phinetune, QLoRA, auto"))
    for bench, method, what in wanted:
        file = DOCS.parent / "benchmarks" / "results" / bench / "avx512-bf16.json"
        part = json.loads(file.read_text(encoding="utf-8"))["parts"]["whole"]
        row = next(row for row in part["rows"] if row["what"] == what)
        yield FAMILY[0].name, method, "a step of a run", row["tokens_per_s"], _machine(part["machine"])


def _planned() -> Iterator[Timed]:
    """What plans said on one machine."""
    tree = json.loads(SPEEDS.read_text(encoding="utf-8")) if SPEEDS.is_file() else {"rows": []}
    for one in tree["rows"]:
        yield one["model"], one["method"], "a plan", one["tokens_per_s"], _machine(tree)


def _machine(facts: dict[str, Any]) -> str:
    return f"{facts['processor']}, {facts['threads']} threads, {facts['instructions']}, {facts['date']}"
