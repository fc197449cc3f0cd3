"""How a run ended, and how what it left differs from what another left."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from phinetune.errors import MACHINE_FAULT

# In metrics.jsonl and results.json: what a clock or the machine decides.
CLOCKED = {
    *("time", "tokens_per_s", "memory", "seconds", "resumed", "share"),
    *("eval_runtime", "eval_samples_per_second", "eval_steps_per_second"),
}


REFUSED = (2, MACHINE_FAULT)  # the exit statuses that come with a sentence


@dataclass(frozen=True)
class Ended:
    """How a run ended: its exit status (the negative number of a signal), what it printed, its operations."""

    status: int
    text: str
    seen: int


def unlike_a_sentence(ended: Ended) -> list[str]:
    """What is wrong with how a run ended: neither whole, nor refused in a sentence, nor killed."""
    if "Traceback" in ended.text or ended.status not in (0, *REFUSED, -9):
        text = ended.text.partition("\nExtension modules: ")[0].strip()
        return [f"status {ended.status}: {text[-2500:]}"]
    if ended.status in REFUSED and "error: " not in ended.text:
        return [f"status {ended.status} without a sentence: {ended.text.strip()[-300:]}"]
    return []


def innermost(text: str) -> str:
    """The place of the call in which a process ended, from what faulthandler wrote."""
    found = re.search(r"\(most recent call first\):\n\s*(.+)", text)
    return found[1] if found else "an unknown place"


def without_clock(tree: Any) -> Any:
    """A tree of JSON without what the clock or the machine decides."""
    if isinstance(tree, dict):
        return {key: without_clock(value) for key, value in tree.items() if key not in CLOCKED}
    return [without_clock(item) for item in tree] if isinstance(tree, list) else tree


def first_difference(a: Any, b: Any) -> str:
    """Where two trees of JSON differ first, in words."""
    if isinstance(a, dict) and isinstance(b, dict):
        for key in {**a, **b}:
            if a.get(key) != b.get(key):
                return f"{key}: {first_difference(a.get(key), b.get(key))}"
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        for i, (left, right) in enumerate(zip(a, b, strict=True)):
            if left != right:
                return f"[{i}]: {first_difference(left, right)}"
    return f"{str(a)[:120]} is not {str(b)[:120]}"
