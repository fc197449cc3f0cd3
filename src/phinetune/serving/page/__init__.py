"""The page at `/`: data, plan and training, base and tuned model side by side, and what others get of a model.

`routes.py` has the pages, which ask for the session themselves (`rendering.py`). What they show and do comes from the
API's own endpoints and from `/phinetune/…`: looks at files and plans (`look_routes.py`), votes (`vote_routes.py`) and
exports (`export_routes.py`), and the same as pieces of HTML (`part_routes.py`). All of these are behind the guard.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastapi import APIRouter

    from phinetune.serving.state import ServerState

PAGES = "/page/"  # what begins like this needs no key at the guard: each page asks for the session, files are public


def router(state: ServerState) -> APIRouter:
    """The pages, and the endpoints that they have beside the API's."""
    from fastapi import APIRouter

    from phinetune.serving.page import export_routes, look_routes, part_routes, routes, vote_routes
    from phinetune.serving.page.looking import Looks

    made, looks = APIRouter(), Looks(state)
    for part in (look_routes.router(state, looks), vote_routes.router(state), export_routes.router(state)):
        made.include_router(part)
    made.include_router(part_routes.router(state, looks))
    made.include_router(routes.router(state))
    return made
