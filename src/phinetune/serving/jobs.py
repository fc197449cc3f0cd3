"""`/v1/fine_tuning/jobs`: jobs, their events and their checkpoints."""

from __future__ import annotations

import random
from contextlib import nullcontext
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request

from phinetune.serving.errors import ApiError, too_many
from phinetune.serving.files import FINE_TUNE
from phinetune.serving.held_adapters import held
from phinetune.serving.ids import new_id, now
from phinetune.serving.job_places import JobPlaces
from phinetune.serving.job_request import LARGEST_SEED, JobRequest
from phinetune.serving.job_table import CANCELLED, ENDED, OPEN, PAUSED, QUEUED, RUNNING, VALIDATING, JobTable
from phinetune.serving.job_view import show_checkpoint, show_event, show_job
from phinetune.serving.models import no_model
from phinetune.serving.pages import metadata_conditions, page
from phinetune.serving.state import ServerState
from phinetune.serving.store import Row

FORMS = {"supervised": ("chat", "completion"), "dpo": ("preference",)}
After = Annotated[str | None, Query(max_length=128)]


def Limit(default: int, most: int) -> Any:
    return Query(default, ge=1, le=most)


def find_job(jobs: JobTable, id: str) -> Row:
    """The row of a job.

    Raises:
        ApiError: there is none.
    """
    job = jobs.get(id)
    if job is None:
        message = f"Could not find fine tune: {id}"
        raise ApiError(404, message, code="fine_tune_not_found", param="fine_tuning_job_id")
    return job


def router(state: ServerState) -> APIRouter:
    """Create, list, retrieve, cancel, pause and resume jobs; list their events and checkpoints."""
    made = APIRouter(prefix="/v1/fine_tuning/jobs", tags=["fine-tuning"])
    jobs = JobTable(state.store)

    @made.post("")
    def create_job(request: JobRequest) -> dict[str, Any]:
        row = new_row(state, request)
        place = JobPlaces(state.folder, row["id"]).held
        holding = held(state, request.model, row["adapter"], place) if row["adapter"] else nullcontext()
        with holding as row["adapter"], state.store.together():
            check_file(state, request.training_file, request.kind, "training_file")
            if request.validation_file:
                check_file(state, request.validation_file, request.kind, "validation_file")
            if len(jobs.in_states(VALIDATING, QUEUED)) >= state.settings.limits.jobs:
                raise too_many(f"{state.settings.limits.jobs:,} jobs wait already.", 60)
            state.store.insert("jobs", row)
            jobs.say(row["id"], f"Created fine-tuning job: {row['id']}")
            jobs.say(row["id"], f"Validating training file: {request.training_file}")
            if request.validation_file:
                jobs.say(row["id"], f"Validating validation file: {request.validation_file}")
        state.wake_jobs()
        return show_job(find_job(jobs, row["id"]))

    @made.get("")
    def list_jobs(request: Request, after: After = None, limit: int = Limit(20, 100)) -> dict[str, Any]:
        where, values = metadata_conditions(request, "request")
        return page(state.store, "jobs", show_job, after=after, limit=limit, where=where, values=values)

    @made.get("/{fine_tuning_job_id}")
    def retrieve_job(fine_tuning_job_id: str) -> dict[str, Any]:
        return show_job(find_job(jobs, fine_tuning_job_id))

    @made.get("/{fine_tuning_job_id}/events")
    def list_events(fine_tuning_job_id: str, after: After = None, limit: int = Limit(20, 1000)) -> dict[str, Any]:
        job = find_job(jobs, fine_tuning_job_id)
        return page(
            *(state.store, "events", show_event), after=after, limit=limit, where=["job = ?"], values=[job["id"]]
        )

    @made.get("/{fine_tuning_job_id}/checkpoints")
    def list_checkpoints(fine_tuning_job_id: str, after: After = None, limit: int = Limit(10, 100)) -> dict[str, Any]:
        job = find_job(jobs, fine_tuning_job_id)
        return page(
            *(state.store, "checkpoints", show_checkpoint),
            after=after,
            limit=limit,
            where=["job = ?"],
            values=[job["id"]],
        )

    @made.post("/{fine_tuning_job_id}/cancel")
    def cancel_job(fine_tuning_job_id: str) -> dict[str, Any]:
        return _change(fine_tuning_job_id, CANCELLED, OPEN, "The job was cancelled", finished_at=now())

    @made.post("/{fine_tuning_job_id}/pause")
    def pause_job(fine_tuning_job_id: str) -> dict[str, Any]:
        told = "The job was paused; a step that has begun is finished and saved"
        return _change(fine_tuning_job_id, PAUSED, (VALIDATING, QUEUED, RUNNING), told, waits_for=None)

    @made.post("/{fine_tuning_job_id}/resume")
    def resume_job(fine_tuning_job_id: str) -> dict[str, Any]:
        job = find_job(jobs, fine_tuning_job_id)
        to = VALIDATING if job["memory"] is None else QUEUED
        return _change(fine_tuning_job_id, to, (PAUSED,), "The job was resumed")

    def _change(id: str, to: str, only_from: tuple[str, ...], told: str, **values: Any) -> dict[str, Any]:
        job = find_job(jobs, id)
        with state.store.together():
            if not jobs.move(id, to, only_from=only_from, **values):
                done = "has already ended" if job["status"] in ENDED else "can't be asked for that now"
                message = f"The job {id} {done}: its status is {job['status']}."
                raise ApiError(400, message, code="invalid_status")
            jobs.say(id, told)
        state.wake_jobs()
        return show_job(find_job(jobs, id))

    return made


def new_row(state: ServerState, request: JobRequest) -> Row:
    """The row of a new job.

    Raises:
        ApiError: its model is not on offer, or its method is none of ours.
    """
    if request.kind == "reinforcement":
        message = "This server tunes by the methods 'supervised' and 'dpo'; 'reinforcement' is not there yet."
        raise ApiError(400, message, code="unsupported_value", param="method.type")
    model = state.models.find(request.model)
    if model is None:
        raise no_model(request.model)
    adapter = str(model.adapter.relative_to(state.folder)) if model.adapter else None
    return {
        "id": new_id("ftjob"),
        "created_at": now(),
        "status": VALIDATING,
        "request": request.model_dump_json(exclude_none=True),
        "model": model.id,
        "base": model.base.model_dump_json(),
        "adapter": adapter,
        "base_id": model.base_id,
        "suffix": request.suffix or "",
        "seed": random.randint(0, LARGEST_SEED) if request.seed is None else request.seed,
        "training_file": request.training_file,
        "validation_file": request.validation_file,
    }


def check_file(state: ServerState, file: str, kind: str, param: str) -> None:
    """Make sure that a method can train on a file.

    Raises:
        ApiError: there is no such file, or it holds rows of another form.
    """
    row = state.store.row("SELECT * FROM files WHERE id = ?", [file])
    if row is None or row["purpose"] != FINE_TUNE:
        what = f"invalid {param}: {file}" if row is None else f"{file} has the purpose '{row['purpose']}'"
        raise ApiError(
            400, f"{what}. Upload a file with the purpose '{FINE_TUNE}'.", code="file_not_found", param=param
        )
    if row["form"] not in FORMS[kind]:
        wanted = " or ".join(FORMS[kind])
        message = f"{file} holds {row['form']} rows; the method '{kind}' takes {wanted} rows."
        raise ApiError(400, message, code="invalid_file_format", param=param)
