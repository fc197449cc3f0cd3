"""`/phinetune/exports`: a tuned model for other programs and people, made in a process of its own, and its download."""

from __future__ import annotations

import json
import os
from typing import Annotated, Any

from fastapi import APIRouter, Query
from fastapi.responses import FileResponse, Response, StreamingResponse

from phinetune.serving.errors import ApiError, too_many
from phinetune.serving.held_adapters import held
from phinetune.serving.ids import new_id, now
from phinetune.serving.models import no_model
from phinetune.serving.page.exports import (
    OFFERED,
    QUEUED,
    RUNNING,
    SUCCEEDED,
    ExportPlaces,
    order_of,
    remove_export,
    show_export,
)
from phinetune.serving.page.forms import Deleted, Export, ExportAsked, Exports
from phinetune.serving.page.tar_stream import tar_stream
from phinetune.serving.pages import page
from phinetune.serving.state import ServerState
from phinetune.serving.store import Row

WAITING = 20  # exports that run or wait
KEPT = 500
TOKEN = "HF_TOKEN"


def router(state: ServerState) -> APIRouter:
    """Begin, list, see, download and delete exports."""
    made = APIRouter(prefix="/phinetune/exports", tags=["exports"])

    @made.post("")
    def create_export(asked: ExportAsked) -> Export:
        """Begin an export; it waits for the one that is being written."""
        model = state.models.find(asked.model)
        if model is None:
            raise no_model(asked.model)
        if model.adapter is None:
            raise ApiError(400, f"{asked.model} is a base model; tuned ones are exported here.", param="model")
        _check_wish(asked)
        _check_room(state)
        id = new_id("export")
        places, adapter = ExportPlaces(state.folder, id), str(model.adapter.relative_to(state.folder))
        row = {"id": id, "created_at": now(), "status": QUEUED, "model": model.id}
        with held(state, model.id, adapter, places.held) as folder:
            order = order_of(places, asked, state.folder / folder)
            state.store.insert("exports", {**row, "folder": folder, "request": json.dumps(order)})
        return show_export(_find(state, id))

    @made.get("")
    def list_exports(
        after: Annotated[str | None, Query(max_length=128)] = None, limit: Annotated[int, Query(ge=1, le=100)] = 20
    ) -> Exports:
        return Exports(**page(state.store, "exports", _shown, after=after, limit=limit))

    @made.get("/{export_id}")
    def retrieve_export(export_id: str) -> Export:
        return show_export(_find(state, export_id))

    @made.get("/{export_id}/content", response_class=StreamingResponse)
    def export_content(export_id: str) -> Response:
        """What was written: the file, or the folder as a tar archive."""
        row = _find(state, export_id)
        place = ExportPlaces(state.folder, row["id"]).written() if row["status"] == SUCCEEDED else None
        if place is None:
            raise ApiError(404, f"{export_id} has no file to download; its status is {row['status']}.")
        if place.is_file():
            return FileResponse(place, filename=place.name, media_type="application/octet-stream")
        size, pieces = tar_stream(place)
        headers = {"Content-Length": str(size), "Content-Disposition": f'attachment; filename="{place.name}.tar"'}
        return StreamingResponse(pieces, media_type="application/x-tar", headers=headers)

    @made.delete("/{export_id}")
    def delete_export(export_id: str) -> Deleted:
        """Stop an export that runs, and delete what it wrote. What was pushed stays on the hub."""
        remove_export(state, _find(state, export_id))
        return Deleted(id=export_id, object="export")

    return made


def _find(state: ServerState, id: str) -> Row:
    row = state.store.row("SELECT * FROM exports WHERE id = ?", [id])
    if row is None:
        raise ApiError(404, f"No such export: {id}", param="export_id")
    return row


def _shown(row: Row) -> dict[str, Any]:
    return show_export(row).model_dump()


def _check_wish(asked: ExportAsked) -> None:
    """Refuse what does not go together.

    Raises:
        ApiError: it does not.
    """
    kinds = OFFERED[asked.target]
    if asked.type is not None and asked.type not in kinds:
        told = f"one of {', '.join(kinds)}" if kinds else "left out"
        raise ApiError(400, f"For '{asked.target}' the type is {told}.", code="invalid_value", param="type")
    if asked.target != "push":
        extra = [name for name in ("repo", "merged") if getattr(asked, name)] + ["private"] * (not asked.private)
        if extra:
            raise ApiError(400, f"'{extra[0]}' is for 'push' alone.", code="invalid_value", param=extra[0])
        return
    if not asked.repo:
        raise ApiError(400, "For 'push', name the repository: NAME or OWNER/NAME.", param="repo")
    if not os.environ.get(TOKEN):
        message = (
            f"{TOKEN} is not set where this server runs, so it can't push. Stop it, set {TOKEN} to a token with write "
            "permission (https://huggingface.co/settings/tokens), and start it again."
        )
        raise ApiError(400, message, code="no_token", param="target")


def _check_room(state: ServerState) -> None:
    rows = state.store.rows("SELECT status, count(*) AS many FROM exports GROUP BY status")
    many = {row["status"]: row["many"] for row in rows}
    if many.get(QUEUED, 0) + many.get(RUNNING, 0) >= WAITING:
        raise too_many(f"{WAITING} exports wait already.", 60)
    if sum(many.values()) >= KEPT:
        raise ApiError(400, f"This server holds {KEPT} exports, its limit; delete some.", code="too_many")
