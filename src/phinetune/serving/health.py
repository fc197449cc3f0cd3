"""`/healthz` and `/metrics`."""

from __future__ import annotations

from fastapi import APIRouter
from fastapi.responses import PlainTextResponse

from phinetune.serving.job_table import ENDED, OPEN
from phinetune.serving.state import ServerState
from phinetune.version import VERSION


def router(state: ServerState) -> APIRouter:
    """Whether the server is there, and its numbers for Prometheus."""
    made = APIRouter(tags=["health"])

    @made.get("/healthz")
    async def healthz() -> dict[str, str]:
        """Whether the server is there. It takes no thread and waits for no disk, so it answers under any load."""
        return {"status": "ok", "version": VERSION}

    @made.get("/metrics", response_class=PlainTextResponse)
    def metrics() -> PlainTextResponse:
        return PlainTextResponse(prometheus(state), media_type="text/plain; version=0.0.4; charset=utf-8")

    return made


def prometheus(state: ServerState) -> str:
    """All numbers in Prometheus' text form."""
    jobs = dict.fromkeys((*OPEN, *ENDED), 0)
    for row in state.store.rows("SELECT status, count(*) AS many FROM jobs GROUP BY status"):
        jobs[row["status"]] = row["many"]
    files = state.store.row("SELECT count(*) AS many, coalesce(sum(bytes), 0) AS bytes FROM files") or {}
    lines = [f'phinetune_jobs{{status="{status}"}} {count}' for status, count in jobs.items()]
    lines += [f"phinetune_files {files['many']}", f"phinetune_file_bytes {files['bytes']}"]
    lines += [f"phinetune_models {len(state.models.names())}"]
    numbers = [*state.counters.items(), *(pair for gauge in state.gauges for pair in gauge())]
    lines += [f"{name} {value:.15g}" for name, value in sorted(numbers)]
    families = dict.fromkeys(line.split(" ")[0].partition("{")[0] for line in lines)
    types = {name: "counter" if name.endswith("_total") else "gauge" for name in families}
    told: list[str] = []
    for name, kind in types.items():
        own = [line for line in lines if line.startswith((f"{name} ", f"{name}{{"))]
        told += [f"# TYPE {name} {kind}", *own]
    return "\n".join(told) + "\n"
