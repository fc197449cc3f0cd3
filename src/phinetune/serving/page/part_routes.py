"""`/phinetune/parts/…`: pieces of the page that renew themselves, or that take a while to make. Behind the guard."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi.responses import HTMLResponse

from phinetune.serving.job_request import JobRequest
from phinetune.serving.job_table import JobTable
from phinetune.serving.jobs import find_job
from phinetune.serving.page import views
from phinetune.serving.page.look_routes import MOST_ROWS, First, Model
from phinetune.serving.page.looking import Looks
from phinetune.serving.page.rendering import piece
from phinetune.serving.state import ServerState


def router(state: ServerState, looks: Looks) -> APIRouter:
    """The pieces. They show what the endpoints of the same names answer."""
    made = APIRouter(prefix="/phinetune/parts", include_in_schema=False)
    jobs = JobTable(state.store)

    def part(path: str, template: str, see: Any) -> None:
        def answer(request: Request) -> HTMLResponse:
            return piece(request, template, **see(request))

        made.get(path, response_class=HTMLResponse, name=template)(answer)

    part("/files", "parts/files.html", lambda request: {"files": views.rows_files(state)})
    part("/jobs", "parts/jobs.html", lambda request: {"jobs": views.job_list(state)})
    part("/votes", "parts/votes.html", lambda request: {"votes": views.vote_counts(state)})
    part("/exports", "parts/exports.html", lambda request: {"exports": views.export_list(state)})
    part(
        "/jobs/{job_id}",
        "parts/job.html",
        lambda request: {"job": views.job_view(state, find_job(jobs, request.path_params["job_id"]))},
    )

    @made.get("/files/{file_id}/check", response_class=HTMLResponse)
    def check_part(request: Request, file_id: str, model: Model = None) -> HTMLResponse:
        return piece(request, "parts/check.html", check=looks.check(file_id, model))

    @made.get("/files/{file_id}/rows", response_class=HTMLResponse)
    def rows_part(
        request: Request,
        file_id: str,
        first: First = 0,
        count: Annotated[int, Query(ge=1, le=MOST_ROWS)] = 3,
        model: Model = None,
    ) -> HTMLResponse:
        return piece(request, "parts/rows.html", rows=looks.rows(file_id, model, first, count), count=count)

    @made.post("/plan", response_class=HTMLResponse)
    def plan_part(request: Request, asked: JobRequest) -> HTMLResponse:
        return piece(request, "parts/plan.html", plan=looks.plan(asked))

    return made
