"""A Ray cluster: whether one is asked for, a connection to it, and how much of it one training takes."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from phinetune.errors import ConfigError, told_as

ADDRESS = "RAY_ADDRESS"  # Ray's own variable
REACHED_S = 15.0


def address() -> str:
    """Where the cluster is that this program is to use; empty if it is to use none."""
    return os.environ.get(ADDRESS, "")


def check_installed() -> None:
    """Make sure that Ray is there.

    Raises:
        ConfigError: it is not.
    """
    if find_spec("ray") is None:
        raise ConfigError(
            f"{ADDRESS} is set to {address()}, and Ray is not installed; pip install 'phinetune[ray]', or unset it to "
            "work on this machine alone"
        )


@contextmanager
def connected() -> Iterator[Any]:
    """A context with the module `ray`, connected to the cluster. A program that is connected already stays so.

    Raises:
        ConfigError: Ray is not installed, or the cluster can't be reached.
    """
    check_installed()
    import ray

    own = not ray.is_initialized()
    if own:
        check_reached()
        with told_as(ConfigError, f"{ADDRESS}={address()}"):
            ray.init(log_to_driver=False, logging_level=logging.WARNING)
    try:
        yield ray
    finally:
        if own:
            ray.shutdown()


def check_reached() -> None:
    """Make sure that something listens there: Ray itself waits for many minutes.

    Raises:
        ConfigError: nothing does.
    """
    host, _, port = address().rpartition("//")[2].rpartition(":")
    if not (host and port.isdigit()):
        return  # `auto`, or what Ray itself understands at once
    with told_as(ConfigError, f"{ADDRESS}={address()}: no cluster is there"):
        socket.create_connection((host.strip("[]"), int(port)), timeout=REACHED_S).close()


@dataclass(frozen=True)
class Share:
    """What one training takes of a node: a GPU with its part of the processors, or all processors of one without."""

    cpus: int
    gpus: int = 0

    def __str__(self) -> str:
        cpus = "1 processor" if self.cpus == 1 else f"{self.cpus} processors"
        return f"a GPU and {cpus}" if self.gpus else cpus


def share_of(nodes: Iterable[Mapping[str, Any]], *, on_gpus: bool) -> Share:
    """What one training takes, so that the smallest node that trains has room for it.

    Args:
        nodes: what Ray says that each has in all (`CPU`, `GPU`).
        on_gpus: whether a GPU is used where there is one.

    Raises:
        ConfigError: no node has a processor for Ray.
    """
    able = [node for node in nodes if node.get("CPU", 0) >= 1]
    if not able:
        raise ConfigError(f"{ADDRESS}={address()}: no node of this cluster gives Ray a processor (ray status)")
    with_gpus = [node for node in able if on_gpus and node.get("GPU", 0) >= 1]
    if with_gpus:
        return Share(min(max(1, int(node["CPU"] // node["GPU"])) for node in with_gpus), 1)
    return Share(min(int(node["CPU"]) for node in able))
