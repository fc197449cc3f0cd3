"""Trains the jobs of a server on a Ray cluster, by Ray's own jobs, which outlive the server.

All nodes share the file system in which the server's folder lies, and have phinetune installed.
"""

from __future__ import annotations

import logging
import secrets
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from phinetune import ray_cluster
from phinetune.errors import ConfigError, RunError, told_as
from phinetune.ray_cluster import ADDRESS, Share, share_of
from phinetune.serving.job_places import JobPlaces
from phinetune.serving.job_process import train_arguments
from phinetune.serving.job_queue import PROGRAM, what_disk_lacks
from phinetune.serving.job_runner import STOPPED, Ended, Record
from phinetune.serving.settings import ServerSettings
from phinetune.serving.store import Row

logger = logging.getLogger(__name__)

KEY = "ray"  # of a record: Ray's id of the job
CONFIG = "phinetune_config"  # of the job's metadata
SAVES_S = 600  # that a run has to finish its step and save; Ray's own 3 s would lose them
ASK_AGAIN_S = 15.0
UNKNOWN = "unknown"
MOST_NODES = 10_000
NO_ROOM = "the Ray cluster has no room for it now"


class JobsOnRay:
    """Trains jobs on a Ray cluster, as many at a time as it has room for.

    A record holds Ray's id of the job.

    Raises:
        ConfigError: Ray is not installed, or there is no such cluster.
    """

    def __init__(self, settings: ServerSettings) -> None:
        ray_cluster.check_installed()
        ray_cluster.check_reached()
        from ray.job_submission import JobSubmissionClient

        with told_as(ConfigError, f"{ADDRESS}={ray_cluster.address()}"):
            self._client: Any = JobSubmissionClient(ray_cluster.address())
        logger.info("jobs train on the Ray cluster that %s names: %s", ADDRESS, ray_cluster.address())
        self._settings = settings
        self._told: set[str] = set()
        self._asked: dict[str, float] = {}

    def start(self, job: Row, places: JobPlaces, environment: Mapping[str, str]) -> Record:
        """Hand a job to Ray, unless it has it already.

        Raises:
            PhinetuneError: the cluster does not take it now.
        """
        with told_as(RunError, "the Ray cluster does not take it now"):
            return self.find([places.config]).get(places.config) or self._submit(job, places, environment)

    def _submit(self, job: Row, places: JobPlaces, environment: Mapping[str, str]) -> Record:
        share = self._share()
        variables = {"OMP_NUM_THREADS": str(share.cpus), "RAY_JOB_STOP_WAIT_TIME_S": str(SAVES_S)}
        id = self._client.submit_job(
            entrypoint=command(places),
            submission_id=f"{job['id']}-{secrets.token_hex(4)}",
            metadata={CONFIG: str(places.config)},
            runtime_env={"env_vars": {**environment, **variables}},
            entrypoint_num_cpus=share.cpus,
            entrypoint_num_gpus=share.gpus or None,
            entrypoint_memory=None if share.gpus or not job["memory"] else int(job["memory"]) + PROGRAM,
        )
        return {KEY: id}

    def find(self, configs: Iterable[Path]) -> Mapping[Path, Record]:
        """The jobs of the cluster that train with some of these configurations, whoever handed them in."""
        wanted = {str(path): path for path in configs}
        known = self._ask("its jobs", self._client.list_jobs) if wanted else []
        found: dict[Path, Record] = {}
        for one in known or []:
            path = wanted.get((one.metadata or {}).get(CONFIG, ""))
            if path is not None and not one.status.is_terminal():
                found[path] = {KEY: one.submission_id}
        return found

    def ended(self, process: Record) -> Ended | None:
        """How a job ended; None if it still trains, waits, or if the cluster can't be asked now."""
        info = self._info(process)
        if info is None:
            return None
        if info == UNKNOWN:  # the cluster was begun anew
            return Ended(None)
        if not info.status.is_terminal():
            return None
        never_began = "START_TIMEOUT" in str(info.error_type)
        return Ended(STOPPED if info.status == "STOPPED" or never_began else info.driver_exit_code)

    def waits(self, process: Record) -> str | None:
        """What a job that was handed to Ray waits for."""
        info = self._info(process)
        return NO_ROOM if info not in (None, UNKNOWN) and info.status == "PENDING" else None

    def ask_to_stop(self, process: Record) -> None:
        """Let a run finish its step, save and stop. It is asked at most once in a while."""
        id, now = process[KEY], time.monotonic()
        if now - self._asked.get(id, -ASK_AGAIN_S) >= ASK_AGAIN_S:
            self._asked[id] = now
            self._ask(id, lambda: self._client.stop_job(id))

    kill = ask_to_stop  # Ray has no other way

    def why_wait(self, job: Row, others: Sequence[Row]) -> str | None:
        """What a queued job waits for: one before it that waits for room on the cluster, or the server's own limit."""
        most = self._settings.at_once
        if most and len(others) >= most:
            return f"this server trains {'one job' if most == 1 else f'{most} jobs'} at a time"
        ahead = [one["id"] for one in others if one["waits_for"]]
        return f"{ahead[0]} is before it, and {NO_ROOM}" if ahead else None

    def what_lacks(self, plan: Mapping[str, Any]) -> tuple[str, str] | None:
        """What no node of the cluster will ever have for a job."""
        lacking = what_disk_lacks(plan)
        nodes = [node for node in self._ask("its nodes", self._nodes) or [] if node.get("CPU", 0) >= 1]
        if lacking or not nodes or not plan["on_cpu"] or share_of(nodes, on_gpus=True).gpus:
            return lacking
        need, most = plan["memory"] + PROGRAM, max(node.get("memory", 0) for node in nodes)
        if need <= most:
            return None
        return "insufficient_memory", (
            f"it needs {need / 1e9:.1f} GB of memory, and no node of the Ray cluster gives it more than "
            f"{most / 1e9:.1f} GB"
        )

    def _share(self) -> Share:
        return share_of(self._nodes(), on_gpus=True)

    def _nodes(self) -> list[dict[str, Any]]:
        from ray.util.state import list_nodes

        nodes = list_nodes(address=self._client.get_address(), limit=MOST_NODES)
        return [node.resources_total or {} for node in nodes if node.state == "ALIVE"]

    def _info(self, process: Record) -> Any:
        """What Ray knows of a job; `UNKNOWN` if it does not know it, None if it can't be asked."""
        id = process[KEY]
        return self._ask(id, lambda: self._client.get_job_info(id), unknown=UNKNOWN)

    def _ask(self, what: str, call: Callable[[], Any], unknown: Any = None) -> Any:
        """What the cluster answers; None if it can't be reached now, which is no end of its jobs.

        Args:
            unknown: stands for its answer that it does not know what it is asked for.
        """
        try:
            answer = call()
        except Exception as error:  # of whatever class Ray has for it
            if "status code 404" in str(error):
                return unknown
            if what not in self._told:
                kind = type(error).__name__
                logger.warning("%s: the Ray cluster does not answer (%s); it is asked again", what, kind)
            self._told.add(what)
            return None
        self._told.discard(what)
        return answer


def command(places: JobPlaces) -> str:
    """What a node's shell is to run: this Python where the node has it, else the node's own."""
    python, log = shlex.quote(sys.executable), shlex.quote(str(places.log))
    arguments = shlex.join(["-m", "phinetune", *train_arguments(places)])
    folder = shlex.quote(str(places.config.parent))
    return f'p={python}; [ -x "$p" ] || p=python; cd {folder} && exec "$p" {arguments} >>{log} 2>&1'
