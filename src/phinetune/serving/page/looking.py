"""Looks at files and plans, for whoever asks over HTTP: in the process beside the server, a few at a time."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from phinetune.errors import PhinetuneError
from phinetune.serving.errors import ApiError, cant_look, too_many
from phinetune.serving.files import FINE_TUNE, find_file
from phinetune.serving.job_config import RATE, chosen_numbers, final_config, first_config
from phinetune.serving.job_places import file_place
from phinetune.serving.job_queue import what_lacks
from phinetune.serving.job_request import JobRequest
from phinetune.serving.jobs import check_file, new_row
from phinetune.serving.models import no_model
from phinetune.serving.page.forms import Check, Planned, Rows, ShownRow
from phinetune.serving.state import ServerState
from phinetune.serving.store import Row
from phinetune.serving.workshop import ServersFault, WorkFailed

LOOK_S, PLAN_S = 600.0, 1800.0  # that a look or a plan may take
WAITING = 8  # looks and plans that are worked on or wait; each holds a thread of the server
KEPT = 200  # looks that are remembered; a file never changes


class Looks:
    """What files hold and jobs will take. All threads may ask."""

    def __init__(self, state: ServerState) -> None:
        self._state = state
        self._places = threading.BoundedSemaphore(WAITING)
        self._kept: OrderedDict[tuple[Any, ...], dict[str, Any]] = OrderedDict()
        self._lock = threading.Lock()

    def check(self, file: str, model: str | None) -> Check:
        """All that `data check` says of a file.

        Raises:
            ApiError: there is no such file or model, or the look failed.
        """
        row, base, request = self._asked(file, model)
        found = self._remembered(("check", file, base), lambda: self._do("whole check", request, LOOK_S, file))
        return Check(file=file, model=base, form=row["form"], **found)

    def rows(self, file: str, model: str | None, first: int, count: int) -> Rows:
        """Some rows of a file, token by token.

        Raises:
            ApiError: there is no such file or model, or the look failed.
        """
        row, base, request = self._asked(file, model)
        wanted = {**request, "first": first, "count": count}
        found = self._remembered(("rows", file, base, first, count), lambda: self._do("rows", wanted, LOOK_S, file))
        shown = [ShownRow(**one) for one in found["rows"]]
        return Rows(file=file, model=base, first=first, total=row["rows"] or 0, data=shown)

    def plan(self, request: JobRequest) -> Planned:
        """What a job will take. It is planned as the job itself will be, and not created.

        Raises:
            ApiError: the job would be refused, or its rows can't be trained on.
        """
        job = new_row(self._state, request)
        check_file(self._state, request.training_file, request.kind, "training_file")
        if request.validation_file:
            check_file(self._state, request.validation_file, request.kind, "validation_file")
        first = first_config(job, self._state.folder)
        made = self._do("plan", {"config": first}, PLAN_S, request.training_file)
        final = final_config(first, made, request.wanted.learning_rate_multiplier)
        lacks = what_lacks(made)
        return Planned(
            **{**made, "fits": made["fits"] and lacks is None},
            lacks=lacks[1] if lacks else None,
            lacks_code=lacks[0] if lacks else None,
            hyperparameters=chosen_numbers(final, request),
            learning_rate=final["training_config"].get(RATE),
        )

    def _asked(self, file: str, model: str | None) -> tuple[Row, str, dict[str, Any]]:
        """A file's row, the model by whose template it is looked at, and the request."""
        row = find_file(self._state, file, "file_id")
        if row["purpose"] != FINE_TUNE:
            raise ApiError(400, f"{file} holds no rows to train on.", param="file_id")
        name = model or self._state.models.base_names[0]
        found = self._state.models.find(name)
        if found is None:
            raise no_model(name)
        path = str(file_place(self._state.folder, file))
        return row, name, {"path": path, "form": row["form"], "model": found.base.model_dump()}

    def _remembered(self, key: tuple[Any, ...], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        made = make()
        with self._lock:
            self._kept[key] = made
            while len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        return made

    def _do(self, task: str, request: dict[str, Any], limit_s: float, file: str) -> dict[str, Any]:
        if not self._places.acquire(blocking=False):
            raise too_many(f"This server looks at {WAITING} files and plans already; try again.", 5)
        try:
            return self._state.workshop.do(task, request, limit_s)
        except ServersFault as error:
            raise cant_look(error, self._state.folder) from None
        except PhinetuneError as error:
            told = "\n".join(error.problems[:20]).replace(str(file_place(self._state.folder, file)), "the file")
            message = told.replace(f"{self._state.folder}/", "")
            raise ApiError(400, message, code="invalid_training_file", param="training_file") from None
        except WorkFailed as error:
            raise ApiError(503, f"The look failed: {error}. Try again.", "server_error", "look_failed") from None
        finally:
            self._places.release()
