"""What the demo gained, in a few lines."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console


def show_gain(results: Mapping[str, Any], console: Console) -> None:
    """One answer before and after, and what was gained."""
    evaluation = results.get("evaluation")
    if not evaluation:
        return
    base, tuned = evaluation["base"], evaluation["tuned"]
    for example in results["examples"][:1]:
        for name, text in (("customer", example["prompt"]), *example["answers"].items()):
            console.print(f"\n{name}> ", end="", style="bold")
            console.print(text, markup=False, highlight=False)
    gains = [f"loss {base['loss']:.2f} → {tuned['loss']:.2f}"]
    if "exact_match" in base:  # the prompts were answered
        gains.append(f"exact match {base['exact_match']:.0f}% → {tuned['exact_match']:.0f}%")
    chats = results["data"]["held_out"]["kept"]
    console.print(f"\nGained on {chats} held-out chats: {', '.join(gains)}.", highlight=False, soft_wrap=True)
