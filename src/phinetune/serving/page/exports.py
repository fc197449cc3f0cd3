"""Exports: what is on offer, where one lies, and the thread that starts their processes and sees their ends.

As with jobs, all that counts is in the rows: an export whose server was killed goes on, and the next server finds its
process or what it wrote.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import subprocess
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phinetune.files import write_text
from phinetune.liveness import is_alive, process_record
from phinetune.serving.child_processes import called_with, kill, spawn
from phinetune.serving.ids import now
from phinetune.serving.page.export_work import RESULT
from phinetune.serving.page.forms import Export, ExportAsked, Written
from phinetune.serving.state import ServerState
from phinetune.serving.store import Row

logger = logging.getLogger(__name__)

# The types that the page offers, the first one by itself; `exporting/targets.py` has more.
OFFERED: dict[str, tuple[str, ...]] = {
    "gguf": ("q4_k_m", "q8_0", "f16"),
    "ollama": ("q8_0", "q4_k_m", "f16"),
    "onnx": ("int4", "f32"),
    "gguf-lora": ("f16", "f32"),
    "merge": (),
    "push": (),
}
QUEUED, RUNNING, SUCCEEDED, FAILED = "queued", "running", "succeeded", "failed"
ROUND_S = 0.5
WORK = "phinetune.serving.page.export_work"
ORDER, LOG, OUT = "order.json", "log", "out"
ODD = re.compile(r"[^A-Za-z0-9._-]+")


@dataclass(frozen=True)
class ExportPlaces:
    """Where an export lies in a server's folder."""

    folder: Path
    export: str

    @property
    def own(self) -> Path:
        return self.folder / "exports" / self.export

    @property
    def order(self) -> Path:
        """What the process is called with, and known by."""
        return self.own / ORDER

    @property
    def held(self) -> Path:
        """The checkpoint that is exported, if it is one, until that is done."""
        return self.own / "from"

    def written(self) -> Path | None:
        """The file or folder that was written; None if there is none."""
        try:
            return next(iter(sorted(place for place in (self.own / OUT).iterdir() if not place.name.startswith("."))))
        except (OSError, StopIteration):
            return None


def own_name(model: str) -> str:
    """A name for what is made of a model: its suffix, or its base's name, and the beginning of its id."""
    parts = [ODD.sub("-", part) for part in model.split(":")]
    base, suffix, id, *checkpoint = (*parts[1:2], *parts[3:]) if len(parts) >= 5 else (parts[0], "", "")
    return "-".join(part for part in (suffix or base, id[:6], *checkpoint) if part).lstrip(".-") or "model"


def order_of(places: ExportPlaces, asked: ExportAsked, adapter: Path) -> dict[str, Any]:
    """What the process is to do with a model's adapter."""
    kinds = OFFERED[asked.target]
    kind = asked.type or (kinds[0] if kinds else None)
    file = own_name(asked.model) + (f"-{kind}" if kind else "")
    ending = ".gguf" if asked.target in ("gguf", "gguf-lora") else ""
    return {
        "target": asked.target,
        "type": kind,
        "run": str(adapter),
        "out": str(places.own / OUT / f"{file}{ending}"),
        "repo": asked.repo,
        "private": asked.private,
        "merged": asked.merged,
    }


def show_export(row: Row) -> Export:
    """An export as the endpoints show it."""
    asked = json.loads(row["request"])
    return Export(
        id=row["id"],
        created_at=row["created_at"],
        finished_at=row["finished_at"],
        status=row["status"],
        model=row["model"],
        target=asked["target"],
        type=asked["type"],
        repo=asked["repo"],
        written=Written(**json.loads(row["result"])) if row["result"] else None,
        error=row["error"],
    )


def remove_export(state: ServerState, row: Row) -> None:
    """Stop an export if it runs, and delete what it wrote."""
    current = state.store.row("SELECT process FROM exports WHERE id = ?", [row["id"]]) or row
    state.store.write("DELETE FROM exports WHERE id = ?", [row["id"]])
    if current["process"]:
        kill(json.loads(current["process"]))
    shutil.rmtree(ExportPlaces(state.folder, row["id"]).own, ignore_errors=True)


class ExportKeeper:
    """A thread that starts one export after the other, each in a process of its own, which outlives the server."""

    def __init__(self, state: ServerState) -> None:
        self.state = state
        self._children: dict[str, subprocess.Popen[bytes]] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._rounds, name="exports", daemon=True)

    def start(self) -> None:
        """Find the processes that another server left, and begin."""
        self.adopt()
        self._thread.start()

    def close(self) -> None:
        """End the thread. What is being written is written on."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(5)

    def adopt(self) -> None:
        """Record processes that were started in the moment in which a server was killed; delete what nobody knows."""
        known = {row["id"]: row for row in self.state.store.rows("SELECT * FROM exports")}
        for place in (self.state.folder / "exports").iterdir():
            if place.name not in known:
                shutil.rmtree(place, ignore_errors=True)
        lone = [row for row in known.values() if row["status"] == RUNNING and not row["process"]]
        orders = {ExportPlaces(self.state.folder, row["id"]).order: row["id"] for row in lone}
        for order, process in called_with(orders, WORK).items():
            self.state.store.update("exports", orders[order], process=json.dumps(process))

    def _rounds(self) -> None:
        while not self._stop.wait(ROUND_S):
            try:
                self.round()
            except Exception:
                if not self._stop.is_set():
                    logger.exception("a round over the exports failed; the next one comes in %g s", ROUND_S)

    def round(self) -> None:
        """See the ends of exports that run, and start the next one."""
        for id in [id for id, child in self._children.items() if child.poll() is not None]:
            row = self.state.store.row("SELECT * FROM exports WHERE id = ?", [id])
            status = self._children.pop(id).returncode
            if row:
                self._ended(row, status)
        running = self.state.store.rows("SELECT * FROM exports WHERE status = ?", [RUNNING])
        for row in running:
            is_there = row["id"] in self._children or (row["process"] and is_alive(json.loads(row["process"])))
            if not is_there:
                self._ended(row, None)
        if any(row["id"] in self._children or row["process"] for row in running):
            return
        row = self.state.store.row("SELECT * FROM exports WHERE status = ? ORDER BY seq", [QUEUED])
        if row:
            self._start(row)

    def _start(self, row: Row) -> None:
        """Start a process. The row says so first: a process without a row would be lost."""
        places = ExportPlaces(self.state.folder, row["id"])
        if not self.state.store.write(
            "UPDATE exports SET status = ? WHERE id = ? AND status = ?", [RUNNING, row["id"], QUEUED]
        ):
            return
        write_text(places.order, row["request"], private=True)
        (places.own / OUT).mkdir(exist_ok=True, mode=0o700)
        child = spawn(WORK, [str(places.order)], places.own / LOG, places.own)
        self._children[row["id"]] = child
        record = process_record(child.pid)
        values = [json.dumps(record), row["id"]]
        if not self.state.store.write("UPDATE exports SET process = ? WHERE id = ?", values):  # deleted meanwhile
            kill(record)
            shutil.rmtree(places.own, ignore_errors=True)

    def _ended(self, row: Row, status: int | None) -> None:
        """What becomes of an export whose process is gone."""
        places = ExportPlaces(self.state.folder, row["id"])
        try:
            made = json.loads((places.own / RESULT).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            told = f" (status {status})" if status else ""
            made = {"problems": [f"its process ended before it was done{told}; start it again"]}
        values: dict[str, Any] = {"process": None, "finished_at": now()}
        written = places.written()
        if "done" in made:
            name = written.name if written else json.loads(row["request"])["repo"] or ""
            values |= {"status": SUCCEEDED, "result": json.dumps({"name": name, **made["done"]})}
        else:
            shutil.rmtree(places.own / OUT, ignore_errors=True)
            told = "; ".join(made["problems"][:10]).replace(f"{self.state.folder}{os.sep}", "")
            values |= {"status": FAILED, "error": told}
        self.state.store.update("exports", row["id"], **values)
        shutil.rmtree(places.held, ignore_errors=True)
