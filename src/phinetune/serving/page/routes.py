"""The pages: `/` and `/page/…`. They ask for the session themselves, since the guard lets them through."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import FileResponse, HTMLResponse, RedirectResponse, Response

from phinetune.errors import RunError
from phinetune.reporting.facts import read_run
from phinetune.reporting.render import run_page
from phinetune.serving.errors import ApiError
from phinetune.serving.files import FINE_TUNE, find_file
from phinetune.serving.job_places import JobPlaces
from phinetune.serving.job_table import JobTable
from phinetune.serving.jobs import find_job
from phinetune.serving.page import views
from phinetune.serving.page.rendering import OWN, REPORT, session_of, whole_page
from phinetune.serving.state import ServerState

# The files that a browser loads, by their names here. The report's look and plots are the page's, too.
STATIC = {
    **{name: REPORT / name for name in ("style.css", "plots.js")},
    **{name: REPORT / "uplot" / name for name in ("uPlot.min.css", "uPlot.iife.min.js")},
    **{place.name: place for place in (OWN / "static").iterdir() if place.suffix in (".css", ".js")},
}
KINDS = {".css": "text/css", ".js": "text/javascript"}
Make = Callable[[Request], Response]


def router(state: ServerState) -> APIRouter:
    """The pages and their files."""
    made = APIRouter(include_in_schema=False)
    jobs = JobTable(state.store)

    def shown(request: Request, make: Make) -> Response:
        """A page for whoever is signed in. Others are led to where they sign in."""
        if session_of(request, state) is None:
            return RedirectResponse("/", 303)
        try:
            return make(request)
        except ApiError as error:
            return whole_page(request, state, "missing.html", error.status, code=error.code, told=error.message)

    def page(path: str, template: str, see: Callable[[Request], dict[str, Any]]) -> None:
        def answer(request: Request) -> Response:
            return shown(request, lambda asked: whole_page(asked, state, template, **see(asked)))

        made.get(path, response_class=HTMLResponse, name=template)(answer)

    @made.get("/", response_class=HTMLResponse)
    def sign_in(request: Request) -> Response:
        if session_of(request, state):
            return RedirectResponse("/page/data", 303)
        return whole_page(request, state, "sign_in.html")

    @made.get("/page/static/{name}")
    def static_file(name: str) -> Response:
        place = STATIC.get(name)
        if place is None:
            raise ApiError(404, f"No such file: {name}")
        return FileResponse(place, media_type=KINDS[place.suffix])

    @made.get("/page/jobs/{job_id}/report", response_class=HTMLResponse)
    def report(request: Request, job_id: str) -> Response:
        """The report of the job's run; while it trains, one that renews itself. It has a policy of its own."""

        def make(request: Request) -> Response:
            places = JobPlaces(state.folder, find_job(jobs, job_id)["id"])
            try:
                run = read_run(places.run.path)
            except RunError:
                raise ApiError(404, "The job has not begun to train.") from None
            return HTMLResponse(run_page(run, live=run.state == "running"))

        return shown(request, make)

    def see_file(request: Request) -> dict[str, Any]:
        row = find_file(state, request.path_params["file_id"])
        if row["purpose"] != FINE_TUNE:
            raise ApiError(404, f"{row['id']} holds no rows to train on.")
        bases = state.models.base_names
        asked = request.query_params.get("model")
        return {"file": row, "bases": bases, "model": asked if asked in bases else bases[0]}

    def see_training(request: Request) -> dict[str, Any]:
        asked = request.query_params
        return {
            **{"files": views.rows_files(state), "models": views.model_names(state), "jobs": views.job_list(state)},
            **{"file": asked.get("file", ""), "held_out": asked.get("held_out", ""), "model": asked.get("model", "")},
        }

    def see_job(request: Request) -> dict[str, Any]:
        return {"job": views.job_view(state, find_job(jobs, request.path_params["job_id"]))}

    def see_models(request: Request) -> dict[str, Any]:
        return {"models": views.model_names(state), "picked": views.picked_models(state, request.query_params)}

    page("/page/data", "data.html", lambda request: {"files": views.rows_files(state)})
    page("/page/files/{file_id}", "file.html", see_file)
    page("/page/train", "train.html", see_training)
    page("/page/jobs/{job_id}", "job.html", see_job)
    page("/page/compare", "compare.html", lambda asked: {**see_models(asked), "votes": views.vote_counts(state)})
    page("/page/hand-on", "hand_on.html", lambda asked: {**see_models(asked), "exports": views.export_list(state)})
    return made
