"""Looks at files and plans jobs, in a process beside the server: `python -m phinetune.serving.work`.

It reads one request a line from its standard input, as JSON, and answers with one line. The libraries are loaded once,
and whatever a file does to them, the server goes on. It ends when its input ends.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phinetune.errors import ModelError, PhinetuneError, reason_of
from phinetune.files import disk_trouble, is_machine_fault
from phinetune.loading import libraries

if TYPE_CHECKING:
    from phinetune.config.run import RunConfig

SHOWN = 20  # lines that are told of a file
# The forms of rows that OpenAI's API takes, by the keys that a row has.
FORMS = {
    "chat": ("messages",),
    "preference": ("input", "preferred_output", "non_preferred_output"),
    "completion": ("prompt", "completion"),
}
# Findings of `data check` that would stop the job, or leave it nothing to learn from.
FATAL = ("broken", "encoding", "nothing", "form", "roles", "content", "tools", "template", "labels", "untrained",
         "letters", "huge", "prompts")  # fmt: skip
Answer = dict[str, Any]


def look_at_file(request: Mapping[str, Any]) -> Answer:
    """What `data check` says of an uploaded file.

    Args:
        request: the file's `path`, the most `rows` it may have, and the section `model` of the base.

    Returns:
        `form`, `rows`, `problems` (line, message and kind each, the first ones), `count` of all problems, and `notes`.
    """
    path = Path(request["path"])
    form, rows, problems = _read_lines(path, int(request["rows"]))
    if problems or form is None:
        told = problems or [{"line": 1, "message": "the file holds no row", "kind": "nothing"}]
        return {"form": form, "rows": rows, "problems": told[:SHOWN], "count": len(told), "notes": []}
    found = _checked(path, form, request["model"])
    fatal = [one for one in found if one["kind"] in FATAL and one["spoils"]]
    notes = [f"{one['count']} × {one['what']}: {one['advice']}" for one in found if one not in fatal]
    lines = sorted((_line(place, one, path) for one in fatal for place in one["places"]), key=lambda one: one["line"])
    return {"form": form, "rows": rows, "problems": lines[:SHOWN], "count": len(lines), "notes": notes}


def _read_lines(path: Path, most: int) -> tuple[str | None, int, list[Answer]]:
    """The form of the rows, how many there are, and the lines that are none."""
    form, rows, problems = None, 0, []
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            rows += 1
            if rows > most:
                too_many = _problem(number, f"more than {most:,} rows", "too_many_rows")
                return form, rows, [too_many | {"code": "too_many_rows"}]
            found, problem = _form_of(line)
            form = form or found
            if problem is None and found != form:
                problem = f"a {found} row among {form} rows; a file holds rows of one form", "mixed_forms"
            if problem:
                problems.append(_problem(number, *problem))
    return form, rows, problems


def _problem(line: int, message: str, kind: str) -> Answer:
    """What is wrong with a line. The page says the kind in its own language."""
    return {"line": line, "message": message, "kind": kind}


def _form_of(line: bytes) -> tuple[str | None, tuple[str, str] | None]:
    """The form of a line's row, or what is wrong with it and of which kind that is."""
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return None, (f"not UTF-8 text ({error.reason})", "encoding")
    except (ValueError, RecursionError) as error:
        return None, (f"no JSON ({reason_of(error, 80)})", "no_json")
    if not isinstance(row, dict):
        return None, (f"expected a JSON object, found {type(row).__name__}", "no_object")
    found = next((name for name, keys in FORMS.items() if all(key in row for key in keys)), None)
    if found:
        return found, None
    forms = "; ".join(" and ".join(f"`{key}`" for key in keys) for keys in FORMS.values())
    keys = ", ".join(f"`{key}`" for key in list(row)[:6]) or "none"
    return None, (f"its keys are {keys}; a row has {forms}", "form")


def _checked(path: Path, form: str, model: Mapping[str, Any]) -> list[Answer]:
    from phinetune.api.data import check_config
    from phinetune.config.run import make_config

    kind = "dpo" if form == "preference" else "sft"
    found = check_config(make_config({"model": model, "objective": {"kind": kind}}), [str(path)])
    return [one.to_dict() for one in found.report.findings.in_order()]


def _line(place: Mapping[str, str], finding: Mapping[str, Any], path: Path) -> Answer:
    number = place["where"].rpartition(":")[2]
    detail = (place["detail"] or finding["what"]).replace(str(path), "the file")
    return _problem(int(number) if number.isdigit() else 1, detail, finding["kind"])


def plan_job(request: Mapping[str, Any]) -> Answer:
    """What `plan` says of a job: memory in bytes, seconds with evaluations, steps, and the settings that rules chose.

    Args:
        request: the run's `config` as nested dictionaries.
    """
    from phinetune.api.plan import plan_config
    from phinetune.checkpoints.device import pick_device
    from phinetune.config.run import make_config

    config = make_config(request["config"])
    fold = fold_system(config)
    made = plan_config(config)
    chosen = {one.key.rpartition(".")[2]: one.value for one in made.settings if not one.given}
    return {
        "memory": made.memory.total,
        "seconds": None if made.seconds is None else made.seconds + (made.evaluations.seconds or 0.0),
        "steps": made.steps.count,
        "rows": made.data.get("kept"),
        "chosen": {**chosen, **({"system": "fold"} if fold else {})},
        "on_cpu": pick_device(config.model.device).type == "cpu",
        "fits": made.fits,
        "free_memory": made.free_memory,
        "settings": [asdict(one) for one in made.settings],
        "nearest": made.nearest,
        "disk": made.disk,
        "free_disk": made.free_disk,
        "notes": [*made.notes, *([made.busy] if made.busy else [])],
    }


def fold_system(config: RunConfig) -> bool:
    """Put system messages in front of the first question if the template would drop them; whether it would."""
    from phinetune.api.held_out import row_encoder

    fold = "system" in row_encoder(config).encoder.dropped_roles
    if fold:
        config.data.system = "fold"
    return fold


def _check_whole(request: Mapping[str, Any]) -> Answer:
    from phinetune.serving.page.looks import whole_check

    return whole_check(request)


def _show_rows(request: Mapping[str, Any]) -> Answer:
    from phinetune.serving.page.looks import shown_rows

    return shown_rows(request)


TASKS: dict[str, Callable[[Mapping[str, Any]], Answer]] = {
    "check": look_at_file,
    "plan": plan_job,
    "whole check": _check_whole,
    "rows": _show_rows,
}


def answer(line: str) -> Answer:
    """The answer to a request: `done`, or `problems` that a client can mend; with `servers` whoever keeps the server
    can, with `unexpected` nobody."""
    request = json.loads(line)
    try:
        return {"done": TASKS[request["task"]](request)}
    except PhinetuneError as error:
        # A client names models that the server offers: what is wrong with one is not wrong with the client's file.
        servers = isinstance(error, ModelError) or is_machine_fault(error)
        return {"problems": error.problems, **({"servers": True} if servers else {})}
    except Exception as error:
        if is_machine_fault(error):
            what = disk_trouble(error) or "the memory is not enough"
            return {"problems": [f"{what} ({reason_of(error)})"], "servers": True}
        return {"problems": [reason_of(error)], "unexpected": type(error).__name__}


def main() -> None:
    """Answer requests until the input ends. What the libraries print goes to standard error."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    with libraries():
        import phinetune.api.data
        import phinetune.api.plan  # noqa: F401
    for line in sys.stdin:
        replies.write(json.dumps(answer(line)) + "\n")
        replies.flush()


if __name__ == "__main__":
    main()
