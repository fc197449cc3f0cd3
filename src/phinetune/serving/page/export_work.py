"""Writes one export, in a process of its own: `python -m phinetune.serving.page.export_work ORDER`.

The order is a JSON file. What came of it is written beside it, as RESULT, so that a server that was away meanwhile
finds it.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from phinetune.errors import PhinetuneError, is_out_of_memory, reason_of
from phinetune.files import write_text
from phinetune.loading import libraries

RESULT = "result.json"
Order = Mapping[str, Any]


def merge(order: Order) -> dict[str, Any]:
    """A transformers model without PEFT."""
    from phinetune.exporting.merge.merge import merge_run

    made = merge_run(order["run"], order["out"])
    return {
        "what": f"a transformers model in {made.files} weight file{'s' if made.files > 1 else ''}",
        "size": made.size,
        "commands": [f"phinetune chat {made.path}"],
        "notes": [],
    }


def export(order: Order) -> dict[str, Any]:
    """A model in another program's form."""
    from phinetune.exporting.targets import export as write

    made = write(order["run"], order["target"], kind=order["type"], out=order["out"])
    return {"what": made.what, "size": made.size, "commands": list(made.commands), "notes": list(made.notes)}


def push(order: Order) -> dict[str, Any]:
    """A repository on the hub, by the environment's token."""
    from phinetune.exporting.hub.push import TOKEN
    from phinetune.exporting.hub.push import push as push_run

    given = {"private": order["private"], "merged": order["merged"], "token": os.environ.get(TOKEN)}
    made = push_run(order["run"], order["repo"], **given)
    what = f"{len(made.files)} files, with a model card; {'private' if made.private else 'public'}"
    commands = [f"phinetune chat {made.repo}"] if made.merged else [f"hf download {made.repo}"]
    return {"what": what, "size": made.size, "commands": commands, "notes": list(made.notes), "url": made.url}


WORK: dict[str, Callable[[Order], dict[str, Any]]] = {"merge": merge, "push": push}


def answer(order: Order) -> dict[str, Any]:
    """What came of an order: `done`, or `problems`."""
    try:
        with libraries():
            import phinetune.exporting.targets  # noqa: F401
        return {"done": WORK.get(order["target"], export)(order)}
    except PhinetuneError as error:
        return {"problems": error.problems}
    except Exception as error:
        short = "the memory is not enough: " if is_out_of_memory(error) else ""
        return {"problems": [f"{short}{type(error).__name__}: {reason_of(error)}"]}


def main() -> None:
    """Do what the order says, and write what came of it."""
    place = Path(sys.argv[1])
    made = answer(json.loads(place.read_text(encoding="utf-8")))
    write_text(place.with_name(RESULT), json.dumps(made), private=True)


if __name__ == "__main__":
    main()
