"""What a job that has come to its end leaves: its model, its result file and its last events."""

from __future__ import annotations

import json

from phinetune.files import write_text
from phinetune.serving.catalogue import tuned_name
from phinetune.serving.ids import new_id, now
from phinetune.serving.job_metrics import as_csv, read_entries
from phinetune.serving.job_places import RESULTS, JobPlaces, file_place
from phinetune.serving.job_table import OPEN, SUCCEEDED, JobTable
from phinetune.serving.state import ServerState
from phinetune.serving.store import Row


def succeed(state: ServerState, jobs: JobTable, job: Row, places: JobPlaces) -> None:
    """Offer the model of a job whose run is finished. All of it is written together, or none."""
    text = as_csv(read_entries(places.run.metrics))
    file, name = new_id("file"), tuned_name(job["base_id"], job["suffix"], job["id"])
    write_text(file_place(state.folder, file, RESULTS), text, private=True)
    row = {"id": file, "created_at": now(), "bytes": len(text.encode()), "filename": "step_metrics.csv"}
    values = {
        "process": None,
        "finished_at": now(),
        "fine_tuned_model": name,
        "result_files": json.dumps([file]),
        "trained_tokens": _tokens(places),
    }
    with state.store.together():
        if not jobs.move(job["id"], SUCCEEDED, only_from=OPEN, **values):
            return
        state.store.insert("files", {**row, "purpose": RESULTS})
        state.models.add(name, json.loads(job["base"]), places.run.path, job["id"])
        jobs.say(job["id"], f"New fine-tuned model created: {name}")
        jobs.say(job["id"], "The job has successfully completed")


def _tokens(places: JobPlaces) -> int | None:
    try:
        training = json.loads(places.run.results.read_text(encoding="utf-8"))["training"]
        return int(training["tokens"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
