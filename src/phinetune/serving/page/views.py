"""What the page shows of the server's rows."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from phinetune.errors import PhinetuneError
from phinetune.reporting.curves import charts
from phinetune.reporting.facts import read_run
from phinetune.serving.catalogue import FINE_TUNED
from phinetune.serving.files import FINE_TUNE
from phinetune.serving.job_places import JobPlaces
from phinetune.serving.job_request import JobRequest
from phinetune.serving.job_table import ENDED, RUNNING, shown_status
from phinetune.serving.page.exports import OFFERED, SUCCEEDED, ExportPlaces, show_export
from phinetune.serving.page.vote_routes import count_votes, show_vote
from phinetune.serving.state import ServerState
from phinetune.serving.store import Row

SHOWN = 200  # files or jobs of a list; the API has them all
EVENTS = 30
LATEST_VOTES = 5
CHARTS = ("loss", "eval_loss")


def rows_files(state: ServerState) -> list[Row]:
    """The files to train on, newest first."""
    return state.store.rows("SELECT * FROM files WHERE purpose = ? ORDER BY seq DESC LIMIT ?", [FINE_TUNE, SHOWN])


def model_names(state: ServerState) -> dict[str, list[str]]:
    """The names of what is on offer: `base` models, and `tuned` ones, newest first, each before its checkpoints."""
    names = [one.id for one in state.models.names()]
    tuned = [name for name in names[::-1] if name.startswith(FINE_TUNED)]
    return {
        "base": [name for name in names if not name.startswith(FINE_TUNED)],
        "tuned": sorted(tuned, key=_is_checkpoint),
    }


def _is_checkpoint(name: str) -> bool:
    return name.count(":") > 4


def picked_models(state: ServerState, asked: Mapping[str, str]) -> dict[str, str]:
    """The models to begin with: the one that was asked for or the newest, and its base."""
    names = model_names(state)
    wanted = asked.get("model", "")
    tuned = wanted if wanted in names["tuned"] else next(iter(names["tuned"]), names["base"][0])
    found = state.models.find(tuned)
    base = found.base_id if found and found.base_id in names["base"] else names["base"][0]
    return {"base": base, "tuned": tuned}


def job_list(state: ServerState) -> list[dict[str, Any]]:
    """All jobs, newest first, each as far as a list shows it."""
    rows = state.store.rows("SELECT * FROM jobs ORDER BY seq DESC LIMIT ?", [SHOWN])
    return [_job(state, row) for row in rows]


def job_view(state: ServerState, row: Row) -> dict[str, Any]:
    """A job with its curves, events and checkpoints."""
    events = state.store.rows("SELECT * FROM events WHERE job = ? ORDER BY seq DESC LIMIT ?", [row["id"], EVENTS])
    checkpoints = state.store.rows("SELECT * FROM checkpoints WHERE job = ? ORDER BY seq DESC", [row["id"]])
    last: dict[str, Any] = next((json.loads(one["data"]) for one in events if one["data"]), {})
    return {
        **_job(state, row),
        "numbers": json.loads(row["chosen"]),
        "seed": row["seed"],
        "events": events,
        "checkpoints": checkpoints,
        "last": last,
        "charts": _charts(state, row),
    }


def _job(state: ServerState, row: Row) -> dict[str, Any]:
    places = JobPlaces(state.folder, row["id"])
    steps = places.run.read_start().get("steps") if row["status"] not in ENDED and places.run.is_run else None
    finish = row["estimated_finish"] if row["status"] == RUNNING else None
    keys = ("id", "status", "model", "created_at", "finished_at", "waits_for", "suffix", "base_id", "fine_tuned_model")
    return {
        **{key: row[key] for key in keys},
        "status": shown_status(row),
        "kind": JobRequest.model_validate_json(row["request"]).kind,
        "files": [_file_name(state, row[key]) for key in ("training_file", "validation_file") if row[key]],
        "error": json.loads(row["error"]) if row["error"] else None,
        "done": row["told_step"],
        "steps": steps if isinstance(steps, int) else None,
        "left": max(0, finish - time.time()) if finish else None,
        "has_run": places.run.is_run,
        "ended": row["status"] in ENDED,
    }


def _file_name(state: ServerState, file: str) -> str:
    row = state.store.row("SELECT filename FROM files WHERE id = ?", [file])
    return row["filename"] if row else file


def _charts(state: ServerState, row: Row) -> list[dict[str, Any]]:
    """The curves that the page draws; the report has the others."""
    try:
        run = read_run(JobPlaces(state.folder, row["id"]).run.path)
    except PhinetuneError:
        return []
    return [chart for chart in charts([run]) if chart["key"] in CHARTS and chart["series"]]


def vote_counts(state: ServerState) -> dict[str, Any]:
    """How many votes there are, for whom, and the newest ones."""
    preferring, equal = count_votes(state)
    query = "SELECT preferred_model AS model, count(*) AS many FROM votes WHERE NOT equal GROUP BY model"
    latest = state.store.rows("SELECT * FROM votes ORDER BY seq DESC LIMIT ?", [LATEST_VOTES])
    return {
        "preferring": preferring,
        "equal": equal,
        "by_model": state.store.rows(f"{query} ORDER BY many DESC LIMIT 10"),
        "latest": [show_vote(row) for row in latest],
    }


def export_list(state: ServerState) -> dict[str, Any]:
    """What is on offer, and the exports that there are, newest first."""
    rows = state.store.rows("SELECT * FROM exports ORDER BY seq DESC LIMIT ?", [SHOWN])
    return {"offered": OFFERED, "all": [(show_export(row), _written(state, row)) for row in rows]}


def _written(state: ServerState, row: Row) -> Path | None:
    return ExportPlaces(state.folder, row["id"]).written() if row["status"] == SUCCEEDED else None
