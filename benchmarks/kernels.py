"""The element-wise kernels and the product of few rows, beside torch's, torch.compile's and the rate of a plain copy.

    python -m benchmarks.kernels [--threads 2] [--rounds 7] [--only rms_norm,swiglu]

The sizes are those of 1,024 tokens of Phi-3 mini. All forms write into memory that is there already, and each call
takes other memory than the calls before it, so nothing lies in a cache. The forms take turns; times are medians. Bytes
are those that must be read and written once; a copy's are counted likewise. `ATEN_CPU_CAPABILITY=avx2` measures another
instruction set. Writes benchmarks/results/kernels/*.json and kernels.md.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from benchmarks.machine import machine
from benchmarks.store import Book, Part, Row
from phinetune.engine.kernels import cross_entropy, few_rows, norm, rotary, swiglu
from phinetune.engine.kernels.native.operator import Operator, chosen, native_form

TOKENS, LABELS, WIDTH, MLP, VOCABULARY = 1024, 256, 3072, 8192, 32064
HALF = "product of 8 rows, weight in bfloat16"  # of float32; of bfloat16 it is the product of 8 rows
COLD = 192 << 20  # bytes between two uses of the same memory
HEADINGS = (
    *("kernel", "dtype", "MB", "torch, ms", "compiled, ms", "native, ms"),
    *("× torch", "× compiled", "GB/s", "of a copy"),
)
Given = tuple[Any, ...]


def draw(*shape: int, kind: torch.dtype) -> Tensor:
    return torch.randn(shape).to(kind)


def normed(kind: torch.dtype) -> Given:
    x, weight = draw(TOKENS, WIDTH, kind=kind), draw(WIDTH, kind=torch.float32)
    return x, None, weight, 1e-5, torch.zeros_like(x), torch.zeros(TOKENS), None


def added_and_normed(kind: torch.dtype) -> Given:
    x, _, weight, eps, out, scale, _ = normed(kind)
    return x, x.clone(), weight, eps, out, scale, torch.zeros_like(x)


def norms_gradient(kind: torch.dtype) -> Given:
    x, _, weight, _, out, scale, _ = normed(kind)
    return x.clone(), x, weight, scale.fill_(1), None, out


def norms_gradient_beside(kind: torch.dtype) -> Given:
    grad, x, weight, scale, _, out = norms_gradient(kind)
    return grad, x, weight, scale, x.clone(), out


def activated(kind: torch.dtype) -> Given:
    return draw(TOKENS, 2 * MLP, kind=kind), torch.zeros(TOKENS, MLP, dtype=kind)


def activations_gradient(kind: torch.dtype) -> Given:
    gate_up, grad = activated(kind)
    return grad.normal_(), gate_up, torch.zeros_like(gate_up)


def rotated(kind: torch.dtype) -> Given:
    qkv = draw(TOKENS, 3 * WIDTH, kind=kind).view(TOKENS, 96, 96)
    return qkv[:, :64], draw(TOKENS, 48, kind=kind), draw(TOKENS, 48, kind=kind), 1.0


def scored(kind: torch.dtype) -> Given:
    logits, labels = draw(LABELS, VOCABULARY, kind=kind), torch.randint(VOCABULARY, (LABELS,))
    return logits, labels, None, torch.zeros(LABELS), torch.zeros(LABELS)


def learned(kind: torch.dtype) -> Given:
    logits, labels, _, *found = scored(kind)
    return logits, labels, torch.ones(LABELS), *found


def answered(kind: torch.dtype) -> Given:
    """A token of each of eight answers, and the weight of gate and up."""
    return draw(8, WIDTH, kind=kind), draw(2 * MLP, WIDTH, kind=kind), torch.zeros(8, 2 * MLP, dtype=kind)


def answered_in_half(kind: torch.dtype) -> Given:
    """The same, with a weight that lies in bfloat16."""
    x, weight, out = answered(kind)
    return x, weight.bfloat16(), out


# The kernel, what it is given, and the large tensors that it reads and those that it writes.
CASES: dict[str, tuple[Operator, Callable[[torch.dtype], Given], tuple[int, ...]]] = {
    "norm": (norm._forward, normed, (0, 4)),
    "sum and norm": (norm._forward, added_and_normed, (0, 1, 4, 6)),
    "norm backward": (norm._backward, norms_gradient, (0, 1, 5)),
    "norm backward and sum": (norm._backward, norms_gradient_beside, (0, 1, 4, 5)),
    "SwiGLU": (swiglu._forward, activated, (0, 1)),
    "SwiGLU backward": (swiglu._backward, activations_gradient, (0, 1, 2)),
    "rotation": (rotary._rotate_, rotated, (0, 0)),
    "cross-entropy": (cross_entropy._cross_entropy_, scored, (0,)),
    "product of 8 rows": (few_rows._few_rows, answered, (1,)),
    HALF: (few_rows._few_rows_of_half, answered_in_half, (1,)),
    "cross-entropy and gradient": (cross_entropy._cross_entropy_, learned, (0, 0)),
}


def compiled_form(name: str) -> Callable[..., None] | None:
    """What torch.compile makes of a kernel's formula, written to the same places; None: there is no such form."""

    def forward(x: Any, residual: Any, weight: Any, eps: Any, out: Any, scale: Any, total: Any) -> None:
        if residual is not None:
            x = x + residual
            total.copy_(x)
        made, by = norm._normed(x, weight, eps)
        out.copy_(made)
        scale.copy_(by)

    def backward(grad: Any, x: Any, weight: Any, scale: Any, beside: Any, dx: Any) -> None:
        made = norm._slope(grad, x, weight, scale)
        dx.copy_(made if beside is None else made + beside)

    def rotate(states: Any, cos: Any, sin: Any, sign: float) -> None:
        first, second = states.chunk(2, dim=-1)
        c, s = cos[:, None], sin[:, None] * sign
        states.copy_(torch.cat([first * c - second * s, second * c + first * s], dim=-1))

    def score(logits: Any, labels: Any, weights: Any, log_probs: Any, first: Any) -> None:
        first.copy_(logits.argmax(-1) == labels)
        log_p = torch.log_softmax(logits.float(), dim=-1)
        log_probs.copy_(log_p.gather(1, labels[:, None])[:, 0])
        if weights is not None:
            hot = torch.arange(logits.shape[1]) == labels[:, None]
            logits.copy_((log_p.exp() - hot.float()) * weights[:, None])

    return {
        "few_rows": lambda x, weight, out: out.copy_(x @ weight.t()),
        "few_rows_of_half": lambda x, weight, out: out.copy_(x @ weight.to(x.dtype).t()),
        "rms_norm": forward,
        "rms_norm_backward": backward,
        "swiglu": lambda gate_up, out: out.copy_(swiglu._activated(gate_up)),
        "swiglu_backward": lambda grad, gate_up, out: out.copy_(swiglu._backward_to_compile(grad, gate_up)),
        "rotate_": rotate,
        "cross_entropy_": score,
    }[name]


def copy_rate(rounds: int) -> float:
    """Bytes a second that torch's copy reads and writes."""
    pairs = [(torch.ones(COLD // 8), torch.zeros(COLD // 8)) for _ in range(2)]
    taken = [timed(lambda to, source: to.copy_(source), pair) for pair in pairs * rounds]
    return COLD / statistics.median(taken[2:])


def timed(run: Callable[..., object], given: Given) -> float:
    start = time.perf_counter()
    run(*given)
    return time.perf_counter() - start


def measure(name: str, kind: torch.dtype, rounds: int, copies: float) -> Row:
    """One kernel in one dtype."""
    operator, make, moved = CASES[name]
    first = make(kind)
    size = sum(first[i].numel() * first[i].element_size() for i in moved)
    sets: Iterator[Given] = itertools.cycle([first, *(make(kind) for _ in range(max(1, COLD // size)))])
    forms = {
        "torch": operator.by_torch,
        "compiled": torch.compile(compiled_form(operator.name)),  # type: ignore[arg-type]
        "native": native_form(operator.name),
    }
    for run in forms.values():
        run(*next(sets))
        run(*next(sets))
    turns = [{form: timed(run, next(sets)) for form, run in forms.items()} for _ in range(rounds)]
    taken = {form: statistics.median(turn[form] for turn in turns) for form in forms}
    rate = size / taken["native"]
    return {
        **{"what": name, "dtype": str(kind).removeprefix("torch."), "mb": size / 1e6},
        **{f"{form}_ms": 1e3 * seconds for form, seconds in taken.items()},
        **{"times_torch": taken["torch"] / taken["native"], "times_compiled": taken["compiled"] / taken["native"]},
        **{"gb_s": rate / 1e9, "share_of_copy": rate / copies},
    }


def cells(row: Row) -> list[str]:
    ms = [f"{row[f'{form}_ms']:.2f}" for form in ("torch", "compiled", "native")]
    ratios = [f"{row[key]:.1f}" for key in ("times_torch", "times_compiled", "gb_s")]
    return [row["what"], row["dtype"], f"{row['mb']:.0f}", *ms, *ratios, f"{row['share_of_copy']:.0%}"]


def meaning(name: str, part: Part) -> str:
    """What a part of this benchmark is."""
    return f"The sizes of 1,024 tokens of Phi-3 mini. A copy moves {part['machine']['copy_gb_s']:.1f} GB/s."


BOOK = Book("kernels", "Element-wise kernels", HEADINGS, cells, meaning, words=HEADINGS[:2])


def main() -> None:
    """Measure, print a table, write the results."""
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("--threads", type=int, default=2)
    cli.add_argument("--rounds", type=int, default=7)
    cli.add_argument("--only", default=",".join(CASES), help="some of the kernels; then nothing is written")
    given = cli.parse_args()
    torch.set_num_threads(given.threads)
    if not chosen():
        raise SystemExit("no native kernels on this machine: the log says why")
    copies = copy_rate(given.rounds)
    names = given.only.split(",")
    kinds = (torch.float32, torch.bfloat16)
    wanted = [(name, kind) for kind in kinds for name in names if name != HALF or kind == torch.float32]
    rows = [measure(name, kind, given.rounds, copies) for name, kind in wanted]
    about = {**machine("none"), "threads": given.threads, "copy_gb_s": copies / 1e9}
    console = Console(width=130)
    console.print(BOOK.table(f"{about['instructions']}; a copy moves {copies / 1e9:.1f} GB/s", rows))
    if names == list(CASES):
        console.print(f"Wrote {' and '.join(map(str, BOOK.keep({'operators': {'machine': about, 'rows': rows}})))}")


if __name__ == "__main__":
    main()
