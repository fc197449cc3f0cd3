"""An operator in several forms: torch's, native for CPUs where that measured faster, and Triton's for CUDA devices."""

from __future__ import annotations

import functools
import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from phinetune.engine.kernels.native import build
from phinetune.files import write_text

logger = logging.getLogger(__name__)

DTYPES = (torch.float32, torch.bfloat16)
DTYPES_OF = {"cpu": DTYPES, "cuda": (*DTYPES, torch.float16)}
TRIALS = "trials.json"  # seconds of both forms, measured once beside the library
ROUNDS = 7  # of a trial
SLOWER = 1.2  # a native form is left aside above this many times torch's seconds: other programs disturb a trial
CLOSE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}  # how far a native result may lie from torch's

UNABLE = {"native_is_faster": False, "failed": "the processor has no instructions for this"}  # nothing to mend

Run = Callable[..., Any]
_all: dict[str, Operator] = {}


class Operator:
    """Calls one of an operator's forms. All write their results into tensors that the caller made.

    Args:
        name: of the native form, `torch.ops.phinetune.<name>`, and of Triton's.
        by_torch: the form for every device and dtype; the reference in tests. It takes the same arguments.
        sample: makes arguments of a usual size in a dtype, for the trial. The first of them is a tensor of that dtype.
        products: whether the native form multiplies matrices, which not every processor can do in bfloat16.
    """

    def __init__(
        self, name: str, by_torch: Run, sample: Callable[[torch.dtype], tuple[Any, ...]], *, products: bool = False
    ) -> None:
        self.name, self.by_torch, self.sample, self.products = name, by_torch, sample, products
        _all[name] = self

    def __call__(self, first: Tensor, *others: Any) -> None:
        self.form(first)(first, *others)

    def is_native(self, x: Tensor) -> bool:
        """Whether a form other than torch's takes `x`."""
        return self.form(x) is not self.by_torch

    def form(self, x: Tensor) -> Run:
        """The form that takes `x`, its first argument."""
        if torch.compiler.is_compiling() or x.dtype not in DTYPES_OF.get(x.device.type, ()):
            return self.by_torch
        if x.device.type == "cuda":
            return on_cuda().get(self.name, self.by_torch)
        return chosen().get((self.name, x.dtype), self.by_torch)


@functools.cache
def chosen() -> dict[tuple[str, torch.dtype], Run]:
    """The native forms that measured faster on this machine, by name and dtype. Empty if there is no library."""
    try:
        folder = build.built(_try_all)
        _load(folder)
        trials = json.loads((folder / TRIALS).read_text(encoding="utf-8"))
    except (build.NotBuilt, OSError, ValueError) as error:
        logger.warning("kernels run as torch's operators, which take longer: %s", error)
        return {}
    faster = [title.split() for title, seconds in trials.items() if seconds["native_is_faster"]]
    return {(name, getattr(torch, kind)): native_form(name) for name, kind in faster}


@functools.cache
def on_cuda() -> dict[str, Run]:
    """The forms for CUDA devices, by name. Empty where Triton is not installed."""
    try:
        from phinetune.engine.kernels.triton_forms import FORMS
    except ImportError as error:
        logger.warning("kernels run as torch's operators, which take longer: %s", error)
        return {}
    return {name: functools.partial(_on_its_device, run) for name, run in FORMS.items()}


def _on_its_device(run: Run, first: Tensor, *others: Any) -> None:
    """Triton computes on the device that is the current one, whatever its tensors say."""
    with torch.cuda.device(first.device):
        run(first, *others)


def _load(folder: Path) -> None:
    """Load the library, but once: torch refuses a second registration of an operator."""
    if not hasattr(torch.ops.phinetune, "rms_norm"):
        torch.ops.load_library(str(folder / build.LIBRARY))


def has_library() -> bool:
    """Whether this process has the native library; it is loaded, and built where it is missing."""
    chosen()
    return hasattr(torch.ops.phinetune, "rms_norm")


def native_form(name: str) -> Run:
    """The native form of an operator, once its library is loaded."""
    run: Run = getattr(torch.ops.phinetune, name).default
    return run


def _try_all(folder: Path) -> None:
    """Load a new library, time its operators beside torch's, and keep what was found."""
    from phinetune.engine.kernels import attention_trees, cross_entropy, few_rows, low_rank, norm, q8, rotary, swiglu  # noqa: F401  they register operators

    _load(folder)
    found = {
        f"{name} {str(kind).removeprefix('torch.')}": _tried(operator, kind)
        for name, operator in _all.items()
        for kind in DTYPES
    }
    for title, seconds in found.items():
        if not seconds["native_is_faster"] and seconds != UNABLE:
            logger.warning("the native form of %s is left aside: %s", title, seconds)
    write_text(folder / TRIALS, json.dumps(found, indent=1))


def _tried(operator: Operator, kind: torch.dtype) -> dict[str, Any]:
    """What `trial` finds; or that the native form cannot run here."""
    if operator.products and not multiplies(kind):
        return UNABLE
    try:
        return trial(operator, kind)
    except RuntimeError as error:
        return {"native_is_faster": False, "failed": str(error).strip().partition("\n")[0]}


def multiplies(kind: torch.dtype) -> bool:
    """Whether this processor can run native products in a dtype, once the library is loaded."""
    return kind != torch.bfloat16 or bool(torch.ops.phinetune.multiplies_bfloat16())


@torch.no_grad()
def trial(operator: Operator, kind: torch.dtype) -> dict[str, Any]:
    """The shortest of some runs of each form in turn, in seconds, whether the results agree, and which form wins."""
    forms = {"native": native_form(operator.name), "torch": operator.by_torch}
    results: dict[str, list[Tensor]] = {}
    best = dict.fromkeys(forms, float("inf"))
    for _ in range(ROUNDS):
        for name, run in forms.items():
            arguments = operator.sample(kind)
            start = time.perf_counter()
            run(*arguments)
            best[name] = min(best[name], time.perf_counter() - start)
            results[name] = [value for value in arguments if isinstance(value, Tensor)]
    pairs = zip(*results.values(), strict=True)
    agrees = all(torch.allclose(a.float(), b.float(), rtol=CLOSE[kind], atol=CLOSE[kind]) for a, b in pairs)
    return {**best, "agrees": agrees, "native_is_faster": agrees and best["native"] <= SLOWER * best["torch"]}


def drawn(*shapes: tuple[int, ...], kind: torch.dtype) -> list[Tensor]:
    """Normal numbers of these shapes, the same at each call."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(kind) for shape in shapes]


def rows_of(x: Tensor) -> Tensor:
    """`x`, shape (..., width), as (rows, width) with no gaps between the elements of a row.

    A row with gaps is copied: vectors are read from neighbouring places.
    """
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 or rows.shape[-1] < 2 else rows.contiguous()
