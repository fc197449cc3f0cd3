"""`/phinetune/files/…` and `/phinetune/plans`: what a file holds, row by row, and what a job will take."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query

from phinetune.serving.job_request import JobRequest
from phinetune.serving.page.forms import Check, Planned, Rows, Split, SplitAsked
from phinetune.serving.page.looking import Looks
from phinetune.serving.page.splitting import split_file
from phinetune.serving.state import ServerState

Model = Annotated[str | None, Query(max_length=512, description="whose template is used; the first base if left out")]
First = Annotated[int, Query(ge=0, le=100_000_000, description="how many rows are left out before")]
MOST_ROWS = 50


def router(state: ServerState, looks: Looks) -> APIRouter:
    """Check a file, show its rows, split it, and plan a job."""
    made = APIRouter(prefix="/phinetune", tags=["looks"])

    @made.get("/files/{file_id}/check")
    def check_file(file_id: str, model: Model = None) -> Check:
        """All that `phinetune data check` says of a file."""
        return looks.check(file_id, model)

    @made.get("/files/{file_id}/rows")
    def file_rows(
        file_id: str,
        first: First = 0,
        count: Annotated[int, Query(ge=1, le=MOST_ROWS)] = 3,
        model: Model = None,
    ) -> Rows:
        """Rows as the model will see them, token by token: what is trained on, and what was cut."""
        return looks.rows(file_id, model, first, count)

    @made.post("/files/{file_id}/split")
    def split(file_id: str, asked: SplitAsked) -> Split:
        """Make two files of one: rows to train on, and rows to measure afterwards what was learnt."""
        return split_file(state, file_id, asked.held_out)

    @made.post("/plans")
    def plan_job(request: JobRequest) -> Planned:
        """What a job will take of memory, time and disk. The body is that of a new job; none is created."""
        return looks.plan(request)

    return made
