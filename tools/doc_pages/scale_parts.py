"""The tables of docs/scale.md, from the formulas of `scale`."""

from __future__ import annotations

import json
from functools import cache

from doc_pages import scale
from doc_pages.family import FAMILY, GIB, METHODS, Model, sizes
from doc_pages.filling import DOCS, table
from doc_pages.scale import Load
from doc_pages.words import said

LINKS = {"100 Mbit/s": 1e8, "1 Gbit/s": 1e9, "10 Gbit/s": 1e10, "200 Gbit/s": 2e11}
DEVICES = (2, 8, 64, 1024)
ROWS = (10**4, 10**6, 10**9)
RESULTS = DOCS.parent / "benchmarks" / "results"
# Unexpected interruptions of Llama 3 405B's training: 419 in 54 days on 16,384 GPUs (Grattafiori et al. 2024, 3.3.4).
HOURS_OF_ONE = 54 * 24 * 16_384 / 419


@cache
def load(model: Model, quantization: str = "none") -> Load:
    """The load of a model with a LoRA of rank 16 in bfloat16."""
    counted, whole = sizes(model, quantization), sizes(model)
    config = counted.config
    hidden, vocabulary = config.hidden_size, config.vocab_size
    tables = (1 if config.tie_word_embeddings else 2) * vocabulary * hidden * counted.width
    layers = counted.weights - tables - hidden * counted.width
    number = config.num_hidden_layers
    return Load(counted.weights, layers, layers // number, counted.trainable, whole.parameters - whole.trainable)


def scale_memory(language: str) -> str:
    """What lies on each device, without activations."""
    head = ["model", "method", "DDP", *(f"FSDP2, {n:,}" for n in DEVICES)]
    rows = []
    for model in FAMILY:
        for method, quantization in METHODS.items():
            one = load(model, quantization)
            fsdp = [f"{scale.fsdp_memory(one, n) / GIB:.1f}" for n in DEVICES]
            rows.append([model.name, method, f"{scale.ddp_memory(one) / GIB:.1f}", *fsdp])
    return table([said(word, language) for word in head], rows, numbers=tuple(range(2, 3 + len(DEVICES))))


def scale_traffic(language: str) -> str:
    """What a device sends in a step of 1,024 devices, and how long that takes on a link."""
    n = DEVICES[-1]
    head = ["model", "what is trained", "bytes a step", *LINKS]
    rows = []
    for model in FAMILY:
        one = load(model)
        for what, size in (
            ("LoRA, DDP", scale.ddp_traffic(one, n)),
            ("LoRA, FSDP2", scale.fsdp_traffic(one, n)),
            ("all weights, DDP", scale.full_traffic(one, n)),
        ):
            times = [_time(scale.seconds_to_send(size, bits)) for bits in LINKS.values()]
            rows.append([model.name, said(what, language), _size(size), *times])
    return table([said(word, language) for word in head], rows, numbers=tuple(range(2, 3 + len(LINKS))))


def scale_accumulation(language: str) -> str:
    """How long a step must compute for nine tenths of the time to be spent on computing."""
    head = ["model", *LINKS]
    rows = []
    for model in FAMILY:
        sent = scale.ddp_traffic(load(model), DEVICES[-1])
        rows.append([model.name, *(_time(9 * scale.seconds_to_send(sent, bits)) for bits in LINKS.values())])
    return table([said(word, language) for word in head], rows, numbers=tuple(range(1, 1 + len(LINKS))))


def scale_data(language: str) -> str:
    """What a set of so many rows takes, by the rate that was measured for a million."""
    measured = json.loads((RESULTS / "data" / "avx2.json").read_text(encoding="utf-8"))["parts"]["million"]["rows"][0]
    a_row = float(measured["besides"].split()[0]) * 1e6 / measured["rows"]
    head = ["rows", "time to prepare, 2 cores", "Arrow files", "order and lengths in each process"]
    rows = [
        [
            f"{rows:,}",
            _time(rows / measured["rows_per_s"]),
            _size(rows * a_row),
            _size(scale.index_bytes(rows)),
        ]
        for rows in ROWS
    ]
    return table([said(word, language) for word in head], rows, numbers=(0, 1, 2, 3))


def scale_failures(language: str) -> str:
    """How often something fails, and how often to save."""
    head = ["devices", "hours between failures", "a checkpoint every"]
    rows = []
    for n in (1, *DEVICES):
        hours = scale.hours_between_failures(n, HOURS_OF_ONE)
        interval = scale.seconds_between_checkpoints(2.0, hours * 3600)
        rows.append([f"{n:,}", f"{hours:,.0f}", _time(interval)])
    return table([said(word, language) for word in head], rows, numbers=(0, 1, 2))


def _size(count: float) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f} B"


def _time(seconds: float) -> str:
    for unit, size in (("d", 86_400), ("h", 3600), ("min", 60), ("s", 1)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e3:.3g} ms"
