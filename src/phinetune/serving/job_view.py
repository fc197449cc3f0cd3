"""Jobs, events and checkpoints as OpenAI's API shows them."""

from __future__ import annotations

import json
from typing import Any

from phinetune.serving.catalogue import OWNER
from phinetune.serving.job_request import JobRequest
from phinetune.serving.job_table import shown_status
from phinetune.serving.store import Row


def show_job(job: Row) -> dict[str, Any]:
    """A job."""
    request = JobRequest.model_validate_json(job["request"])
    numbers = _numbers(job, request)
    supervised = {key: value for key, value in numbers.items() if key != "beta"}
    return {
        "object": "fine_tuning.job",
        "id": job["id"],
        "model": job["model"],
        "created_at": job["created_at"],
        "finished_at": job["finished_at"],
        "fine_tuned_model": job["fine_tuned_model"],
        "organization_id": OWNER,
        "result_files": json.loads(job["result_files"]),
        "status": shown_status(job),
        "validation_file": job["validation_file"],
        "training_file": job["training_file"],
        "hyperparameters": supervised,
        "trained_tokens": job["trained_tokens"],
        "error": json.loads(job["error"]) if job["error"] else None,
        "user_provided_suffix": job["suffix"] or None,
        "seed": job["seed"],
        "estimated_finish": job["estimated_finish"] if job["status"] == "running" else None,
        "integrations": [one.model_dump() for one in request.integrations or []],
        "metadata": request.metadata,
        "method": {"type": request.kind, request.kind: {"hyperparameters": numbers}},
    }


def _numbers(job: Row, request: JobRequest) -> dict[str, Any]:
    """The hyperparameters: `auto` until the plan has chosen them."""
    given = {key: value for key, value in request.wanted.model_dump().items() if value is not None}
    names = ("n_epochs", "batch_size", "learning_rate_multiplier", *(("beta",) if request.kind == "dpo" else ()))
    return {**{name: given.get(name, "auto") for name in names}, **json.loads(job["chosen"])}


def show_event(event: Row) -> dict[str, Any]:
    """An event of a job."""
    return {
        "object": "fine_tuning.job.event",
        "id": event["id"],
        "created_at": event["created_at"],
        "level": event["level"],
        "message": event["message"],
        "data": json.loads(event["data"]) if event["data"] else None,
        "type": event["type"],
    }


def show_checkpoint(checkpoint: Row) -> dict[str, Any]:
    """A checkpoint of a job."""
    return {
        "object": "fine_tuning.job.checkpoint",
        "id": checkpoint["id"],
        "created_at": checkpoint["created_at"],
        "fine_tuned_model_checkpoint": checkpoint["model"],
        "fine_tuning_job_id": checkpoint["job"],
        "metrics": json.loads(checkpoint["metrics"]),
        "step_number": checkpoint["step"],
    }
