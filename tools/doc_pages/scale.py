"""Formulas of docs/scale.md: what a device holds and sends, of a run on many. Tests hold them against small cases.

Bytes and seconds; `n` is the number of devices.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

FLOAT32 = 4
HALF = 2
INDEX = 40  # bytes of an entry of a list of Python's numbers: 8 of the list and 32 of the number
ROW_NUMBERS = 8  # bytes a row of numpy's lengths


@dataclass(frozen=True)
class Load:
    """What decides the load of a device.

    Attributes:
        base: bytes of the base's weights.
        layers: bytes of the decoder layers among them.
        layer: bytes of one decoder layer.
        trainable: parameters of the adapter.
        base_parameters: parameters of the base.
    """

    base: int
    layers: int
    layer: int
    trainable: int
    base_parameters: int


def ring(size: float, n: int) -> float:
    """Bytes that each device sends in a ring all-reduce of `size` bytes (Patarasu and Yuan 2009)."""
    return 2 * (n - 1) / n * size


def gathered(size: float, n: int) -> float:
    """Bytes that each device sends, and receives, to gather what lies in shares on `n` devices."""
    return (n - 1) / n * size


def gradient_bytes(load: Load) -> int:
    """Bytes of an adapter's gradients, which are float32."""
    return FLOAT32 * load.trainable


def ddp_traffic(load: Load, n: int) -> float:
    """Bytes that a device sends in a step of DDP, however many micro-batches it has: the adapter's gradients alone."""
    return ring(gradient_bytes(load), n)


def full_traffic(load: Load, n: int) -> float:
    """The same where all weights train, with gradients of 16 bits."""
    return ring(HALF * load.base_parameters, n)


def fsdp_traffic(load: Load, n: int, batches: int = 1) -> float:
    """Bytes that a device sends in a step of FSDP2: the base is gathered for the forward and for the backward of each
    micro-batch, and the adapter's gradients are scattered and its weights gathered once each.
    """
    return 2 * batches * gathered(load.base, n) + ring(gradient_bytes(load), n)


def adapter_memory(load: Load) -> int:
    """Bytes of the adapter: weights, gradients and AdamW's two moments in float32, and a copy of 16 bits."""
    return load.trainable * (4 * FLOAT32 + HALF)


def ddp_memory(load: Load) -> int:
    """Bytes on a device of DDP, without activations: base, adapter, and DDP's own buckets of gradients."""
    return load.base + adapter_memory(load) + gradient_bytes(load)


def fsdp_memory(load: Load, n: int) -> float:
    """Bytes on a device of FSDP2, without activations: shares of base and adapter, and two layers that are gathered,
    the one that computes and the next.
    """
    return (load.base + adapter_memory(load)) / n + 2 * load.layer


def seconds_to_send(size: float, bits_a_second: float) -> float:
    """The time that bytes take on a link."""
    return 8 * size / bits_a_second


def efficiency(compute: float, send: float) -> float:
    """The share of a step in which a device computes, if nothing is sent while it does: the worst case."""
    return compute / (compute + send)


def accumulation_for(compute: float, send: float, wanted: float) -> int:
    """How many micro-batches of `compute` seconds a step needs, so that its efficiency is `wanted` or more."""
    return max(1, math.ceil(wanted / (1 - wanted) * send / compute))


def hours_between_failures(devices: int, of_one: float) -> float:
    """The mean time between failures of any of `devices`, if each fails once in `of_one` hours."""
    return of_one / devices


def seconds_between_checkpoints(write: float, between_failures: float) -> float:
    """The interval that loses least to writing and to repeated work, by Young (1974): √(2 · write · between)."""
    return math.sqrt(2 * write * between_failures)


def index_bytes(rows: int) -> int:
    """Bytes that a process holds of a set on disk: the shuffled order of its rows, and their lengths."""
    return rows * (INDEX + ROW_NUMBERS)
