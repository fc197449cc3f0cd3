"""The bundled demonstration: its configuration, and what it gained in a few lines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from phinetune.config.run import RunConfig, make_config

CONFIG = "config.yaml"


def demo_config(output_dir: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The demo's configuration: demo/config.yaml with the bundled files' places and `output_dir` filled in.

    Raises:
        ConfigError: an override names an unknown key or holds a bad value.
    """
    here = Path(str(files("phinetune.demo")))
    tree = yaml.safe_load((here / CONFIG).read_text(encoding="utf-8"))
    for key in ("train", "eval"):
        tree["data"][key] = str(here / tree["data"][key])
    tree["training_config"]["output_dir"] = str(output_dir)
    return make_config(tree, overrides, where="demo")


def show_gain(results: Mapping[str, Any], console: Console) -> None:
    """One answer before and after, and what was gained."""
    evaluation = results.get("evaluation")
    if not evaluation:
        return
    base, tuned = evaluation["base"], evaluation["tuned"]
    for example in results["examples"][:1]:
        for name, text in (("customer", example["prompt"]), *example["answers"].items()):
            console.print(f"\n[bold]{name}>[/bold] ", end="")
            console.print(text, markup=False, highlight=False)
    gains = [f"loss {base['loss']:.2f} → {tuned['loss']:.2f}"]
    if "exact_match" in base:  # the prompts were answered
        gains.append(f"exact match {base['exact_match']:.0f}% → {tuned['exact_match']:.0f}%")
    chats = results["data"]["held_out"]["kept"]
    console.print(f"\nGained on {chats} held-out chats: {', '.join(gains)}.", highlight=False, soft_wrap=True)
