"""`/v1/files`: rows to train on, looked at when they come; and the result files of jobs."""

from __future__ import annotations

import asyncio
import json
import logging
import os
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Form, Query, UploadFile
from fastapi.responses import FileResponse

from phinetune.errors import PhinetuneError
from phinetune.files import PRIVATE, sync_folder, write_lines
from phinetune.serving.errors import ApiError, cant_look
from phinetune.serving.ids import new_id, now
from phinetune.serving.job_places import file_place
from phinetune.serving.job_table import JobTable
from phinetune.serving.pages import page
from phinetune.serving.state import ServerState
from phinetune.serving.store import Row
from phinetune.serving.workshop import ServersFault, WorkFailed
from phinetune.terminal_text import printable

logger = logging.getLogger(__name__)

FINE_TUNE = "fine-tune"
PURPOSES = ("assistants", "batch", "fine-tune", "vision", "user_data", "evals")  # that OpenAI's API knows
PIECE = 1 << 20
CHECK_S = 1800.0  # a look at a file may take
LONGEST_LIST = 10_000


def show_file(row: Row) -> dict[str, Any]:
    """A file as the API shows it."""
    notes = json.loads(row["notes"])
    return {
        "object": "file",
        "id": row["id"],
        "bytes": row["bytes"],
        "created_at": row["created_at"],
        "filename": row["filename"],
        "purpose": row["purpose"],
        "status": "processed",
        "expires_at": None,
        "status_details": "\n".join(notes) or None,
    }


def find_file(state: ServerState, file: str, param: str | None = "id") -> Row:
    """The row of a file.

    Raises:
        ApiError: there is none.
    """
    row = state.store.row("SELECT * FROM files WHERE id = ?", [file])
    if row is None:
        raise ApiError(404, f"No such File object: {file}", param=param)
    return row


def router(state: ServerState) -> APIRouter:
    """Upload, list, retrieve, read and delete files."""
    made = APIRouter(prefix="/v1/files", tags=["files"])
    jobs = JobTable(state.store)

    @made.post("")
    async def create_file(
        file: UploadFile,
        purpose: Annotated[str, Form(max_length=64)],
        anchor: Annotated[str | None, Form(alias="expires_after[anchor]", max_length=64)] = None,
        seconds: Annotated[str | None, Form(alias="expires_after[seconds]", max_length=64)] = None,
    ) -> dict[str, Any]:
        """Keep a file of rows, if a job could train on it."""
        _check_wish(state, purpose, anchor or seconds)
        id = new_id("file")
        place = file_place(state.folder, id)
        try:
            size = await _take_in(file, place, state.settings.limits.file)
            await asyncio.to_thread(_acknowledge, state, id, size, _shown_name(file.filename))
        except BaseException:
            place.unlink(missing_ok=True)
            raise
        return show_file(find_file(state, id))

    @made.get("")
    def list_files(
        after: Annotated[str | None, Query(max_length=128)] = None,
        limit: Annotated[int, Query(ge=1, le=LONGEST_LIST)] = LONGEST_LIST,
        order: Literal["asc", "desc"] = "desc",
        purpose: Annotated[str | None, Query(max_length=64)] = None,
    ) -> dict[str, Any]:
        where, values = (["purpose = ?"], [purpose]) if purpose else ([], [])
        return page(
            *(state.store, "files", show_file),
            after=after,
            limit=limit,
            where=where,
            values=values,
            oldest_first=order == "asc",
        )

    @made.get("/{file_id}")
    def retrieve_file(file_id: str) -> dict[str, Any]:
        return show_file(find_file(state, file_id))

    @made.get("/{file_id}/content", response_class=FileResponse)
    def file_content(file_id: str) -> FileResponse:
        row = find_file(state, file_id)
        kind = "text/csv" if row["filename"].endswith(".csv") else "application/octet-stream"
        return FileResponse(file_place(state.folder, row["id"], row["purpose"]), media_type=kind)

    @made.delete("/{file_id}")
    def delete_file(file_id: str) -> dict[str, Any]:
        row = find_file(state, file_id)
        with state.store.together():
            job = jobs.using(row["id"])
            if job:
                message = f"{row['id']} is being trained on by {job['id']}; cancel that job first."
                raise ApiError(409, message, code="file_in_use")
            state.store.write("DELETE FROM files WHERE id = ?", [row["id"]])
        file_place(state.folder, row["id"], row["purpose"]).unlink(missing_ok=True)
        return {"id": row["id"], "object": "file", "deleted": True}

    return made


def keep_lines(state: ServerState, lines: Iterable[str], filename: str) -> Row:
    """Keep a file that this server made, as if it had been uploaded; its row.

    Raises:
        ApiError: a job could not train on it, or there are too many files.
    """
    _check_wish(state, FINE_TUNE, None)
    id = new_id("file")
    place = file_place(state.folder, id)
    try:
        write_lines(place, lines, private=True)
        _acknowledge(state, id, place.stat().st_size, _shown_name(filename))
    except BaseException:
        place.unlink(missing_ok=True)
        raise
    return find_file(state, id)


def sweep(state: ServerState) -> None:
    """Delete what a server that was killed had of files that it never acknowledged."""
    known = {row["id"] for row in state.store.rows("SELECT id FROM files")}
    for place in (state.folder / "files").iterdir():
        if place.name.lstrip(".").partition(".")[0] not in known:
            place.unlink(missing_ok=True)


def _check_wish(state: ServerState, purpose: str, expiry: str | None) -> None:
    if purpose not in PURPOSES:
        message = f"'{printable(purpose)}' is not one of {list(PURPOSES)} - 'purpose'"
        raise ApiError(400, message, param="purpose", code="invalid_value")
    if purpose != FINE_TUNE:
        message = f"This server keeps files with the purpose '{FINE_TUNE}' alone, not '{purpose}'."
        raise ApiError(400, message, param="purpose", code="unsupported_value")
    if expiry:
        logger.warning("expires_after is ignored: files stay until they are deleted")
    many = (state.store.row("SELECT count(*) AS many FROM files") or {})["many"]
    if many >= state.settings.limits.files:
        raise ApiError(400, f"This server holds {many:,} files, its limit; delete some.", code="too_many_files")


async def _take_in(file: UploadFile, place: Path, most: int) -> int:
    """Write an upload to the disk, to its last byte; its size."""
    size = 0
    with open(os.open(place, os.O_WRONLY | os.O_CREAT | os.O_EXCL, PRIVATE), "wb") as target:
        while piece := await file.read(PIECE):
            size += len(piece)
            if size > most:
                raise ApiError(
                    413, f"The file is larger than the {most:,} bytes that this server takes.", code="too_large"
                )
            await asyncio.to_thread(target.write, piece)
        await asyncio.to_thread(_sync, target)
    await asyncio.to_thread(sync_folder, place.parent)
    return size


def _sync(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def _acknowledge(state: ServerState, id: str, size: int, name: str) -> None:
    """Look at a file that is on the disk, and write down that it is there.

    Raises:
        ApiError: a job could not train on it; line by line.
    """
    found = _look(state, file_place(state.folder, id))
    row = {"id": id, "created_at": now(), "bytes": size, "filename": name, "purpose": FINE_TUNE}
    state.store.insert(
        "files", {**row, "form": found["form"], "rows": found["rows"], "notes": json.dumps(found["notes"])}
    )


def _look(state: ServerState, place: Path) -> dict[str, Any]:
    """What `data check` says of a file.

    Raises:
        ApiError: a job could not train on it, line by line; or the server can't look at it now.
    """
    base = next(iter(state.settings.models.values())).model_dump()
    wanted = {"path": str(place), "rows": state.settings.limits.rows, "model": base}
    try:
        found = state.workshop.do("check", wanted, CHECK_S)
    except ServersFault as error:
        raise cant_look(error, state.folder) from None
    except PhinetuneError as error:
        raise _bad_file([{"line": 1, "message": text.replace(str(place), "the file")} for text in error.problems],
                        len(error.problems)) from None  # fmt: skip
    except WorkFailed as error:
        raise ApiError(400, f"The file could not be looked at: {error}.", code="look_failed", param="file") from None
    if found["problems"]:
        raise _bad_file(found["problems"], found["count"])
    return found


def _bad_file(lines: list[dict[str, Any]], count: int) -> ApiError:
    told = [f"Line {one['line']}: {one['message']}" for one in lines]
    more = [f"… and {count - len(lines):,} more"] if count > len(lines) else []
    too_many = any(one.get("code") for one in lines)
    return ApiError(
        413 if too_many else 400,
        "\n".join(["Invalid file format. The file can't be trained on:", *told, *more]),
        code="too_many_rows" if too_many else "invalid_file_format",
        param="file",
        details={"lines": lines, "count": count},
    )


def _shown_name(name: str | None) -> str:
    """A client's name of a file, as a name and nothing else."""
    last = PurePosixPath((name or "").replace("\\", "/")).name
    return printable(last.encode("utf-8", "replace").decode())[:255] or "file.jsonl"
