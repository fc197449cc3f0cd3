"""The reference of the Python API: a directive of mkdocstrings for each public name, which griffe reads unimported."""

from __future__ import annotations

import ast
from pathlib import Path

import phinetune

# What functions return, and what their arguments are made of.
OBJECTS = (
    "phinetune.api.train.Run",
    "phinetune.planning.plan.Plan",
    "phinetune.config.run.RunConfig",
    "phinetune.errors.PhinetuneError",
)


def api_functions(language: str) -> str:
    """The functions that `import phinetune` offers, by their places."""
    places = phinetune._PLACES
    return "\n\n".join(f"### `phinetune.{name}`\n\n::: {places[name]}.{name}" for name in phinetune.__all__)


def api_objects(language: str) -> str:
    """The objects that these functions take and give."""
    return "\n\n".join(f"### `{place.rpartition('.')[2]}`\n\n::: {place}" for place in OBJECTS)


def api_lora(language: str) -> str:
    """loralib's API."""
    return "\n\n".join(f"### `phinetune.lora.{name}`\n\n::: phinetune.lora.{name}" for name in lora_names())


def lora_names() -> list[str]:
    """The names of `phinetune.lora.__all__`, read and not imported, which would load torch."""
    source = Path(phinetune.__file__).with_name("lora") / "__init__.py"
    body = ast.parse(source.read_text(encoding="utf-8")).body
    named = {node.targets[0].id: node.value for node in body if isinstance(node, ast.Assign)}  # type: ignore[attr-defined]
    names: list[str] = ast.literal_eval(named["__all__"])
    return names
