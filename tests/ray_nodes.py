"""A Ray cluster of two nodes on this machine, with a processor each."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager

import pytest


@contextmanager
def two_nodes() -> Iterator[str]:
    """A context with the address of such a cluster, which `RAY_ADDRESS` names meanwhile."""
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.delenv("RAY_ADDRESS", raising=False)
        node = {"num_cpus": 1, "object_store_memory": 100_000_000}
        head = {"include_dashboard": True, "dashboard_port": _free_port(), "gcs_server_port": _free_port()}
        cluster = Cluster(initialize_head=True, head_node_args={**node, **head})
        try:
            cluster.add_node(**node)
            cluster.wait_for_nodes()
            patch.setenv("RAY_ADDRESS", cluster.address)
            yield cluster.address
        finally:
            cluster.shutdown()


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])
