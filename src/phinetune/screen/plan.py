"""A plan for a person: numbers, then yes or no, then what would fit."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta

from rich.console import Console
from rich.table import Table

from phinetune.planning.evaluations import Evaluations
from phinetune.planning.fitting_settings import Changes
from phinetune.planning.plan import Plan
from phinetune.screen.settings import show_settings

PARTS = {
    "weights": "weights",
    "adapter": "adapter and gradients",
    "optimizer": "optimizer",
    "activations": "activations kept",
    "layer": "a layer at work",
    "logits": "a chunk of logits",
}


def show_plan(plan: Plan, console: Console) -> None:
    """Print a plan."""
    steps = plan.steps
    say = [
        f"parameters: {plan.parameters:,}, {plan.trainable:,} of them trained",
        f"data: {plan.data['kept']:,} of {plan.data['rows']:,} rows, {plan.data['tokens']:,} tokens, the longest "
        f"{plan.data['longest']:,}",
        f"steps: {steps.count:,}, {steps.batches} micro-batches each, {steps.mean:,.0f} tokens a micro-batch, the "
        f"largest about {steps.largest:,}; {steps.tokens:,} tokens in all",
    ]
    console.print("\n".join(say), highlight=False, soft_wrap=True)
    show_settings(plan.settings, console)
    console.print(_table(plan))
    console.print("\n".join(_sentences(plan)), highlight=False, soft_wrap=True, markup=False)


def _table(plan: Plan) -> Table:
    table = Table(title="Memory at the peak", title_justify="left")
    table.add_column("part")
    table.add_column("GB", justify="right")
    sizes = plan.memory.to_dict()
    for part, name in PARTS.items():
        table.add_row(name, f"{sizes[part] / 1e9:.2f}")
    table.add_section()
    table.add_row("together (a layer or logits, not both at a time)", f"{sizes['total'] / 1e9:.2f}")
    table.add_row("free now", f"{plan.free_memory / 1e9:.2f}")
    return table


def _sentences(plan: Plan) -> Iterator[str]:
    keep, cheap, whole = plan.layers
    yield f"layers: {keep} keep all, {cheap} recompute norms and SwiGLU, {whole} are recomputed whole"
    if plan.seconds is not None:
        reference = plan.reference_seconds or 0.0
        rate = plan.steps.tokens / (plan.seconds - reference)
        yield f"time: about {timedelta(seconds=round(plan.seconds))} ({rate:,.0f} tokens/s), evaluations apart"
        if reference:
            yield (
                f"reference: about {timedelta(seconds=round(reference))} of it, once; none if an earlier run kept "
                "that of the same rows and weights"
            )
    yield from _evaluations(plan.evaluations)
    if plan.busy:
        yield f"busy: {plan.busy}"
    yield f"disk: {plan.disk / 1e9:.2f} GB of checkpoints, {plan.free_disk / 1e9:.1f} GB free"
    yield from (f"note: {note}" for note in plan.notes)
    if plan.fits:
        yield "Yes: it fits."
        return
    short = [name for name, need, free in _needs(plan) if need > free]
    yield f"No: there is not enough {' and '.join(short)}."
    if "disk" in short:
        yield "Fewer checkpoints: set training_config.save_total_limit, or a larger save_steps."
    if plan.nearest:
        yield "What would fit:"
        yield from (f"  {as_options(changes)}" for changes in plan.nearest)
    elif "memory" in short:
        yield "No change of batch, length or quantisation is enough; take a smaller model or another machine."


def _evaluations(made: Evaluations) -> Iterator[str]:
    if made.count:
        times = "once" if made.count == 1 else f"{made.count} times"
        took = "" if made.seconds is None else f", about {timedelta(seconds=round(made.seconds))} more"
        yield f"evaluations: {made.scored:,} held-out chats are scored {times} while it trains{took}"
    if made.compared:
        answered = f", with {made.answered:,} answers of each" if made.answered else ""
        yield f"comparison: after training, base and tuned on {made.compared:,} chats{answered}; not in the time"


def _needs(plan: Plan) -> list[tuple[str, int, int]]:
    return [("memory", plan.memory.total, plan.free_memory), ("disk", plan.disk, plan.free_disk)]


def as_options(changes: Changes) -> str:
    """Changes as options of the command line."""
    return " ".join(f"--set {key}={value}" for key, value in changes.items())
