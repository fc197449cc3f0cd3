"""The web application: all routers of the API behind one guard."""

from __future__ import annotations

from fastapi import Depends, FastAPI

from phinetune.serving import answers, files, health, jobs, models, page, session_routes
from phinetune.serving.bodies import check_body
from phinetune.serving.errors import add_handlers
from phinetune.serving.safety import Guard
from phinetune.serving.state import ServerState
from phinetune.version import VERSION

ROUTERS = (files.router, jobs.router, models.router, answers.router, session_routes.router, health.router, page.router)


def create_app(state: ServerState) -> FastAPI:
    """The application over a state. Nothing is started by it."""
    app = FastAPI(
        title="phinetune serve",
        version=VERSION,
        description="OpenAI's API of files, fine-tuning jobs, models and answers, on your own machine, and its page.",
        docs_url=None,  # these pages would load scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,
        dependencies=[Depends(check_body)],
    )
    for make in ROUTERS:
        app.include_router(make(state))
    add_handlers(app)
    app.add_middleware(Guard, state=state, open_paths=("/session", "/"), open_prefixes=(page.PAGES,))
    return app
