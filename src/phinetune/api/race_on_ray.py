"""Where `tune` trains its candidates when `RAY_ADDRESS` names a cluster, and what is shown of them meanwhile."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from phinetune.config.run import RunConfig
from phinetune.errors import ConfigError
from phinetune.ray_cluster import ADDRESS, connected, share_of
from phinetune.screen.console import Console, say
from phinetune.training.stretches import Stretch


@contextmanager
def field_on_ray(on_ray: RunConfig | None, device: torch.device, console: Console) -> Iterator[dict[str, Any]]:
    """A context with what a race on a Ray cluster takes besides; nothing for one that is held here.

    Args:
        device: on which the run is finished here. Candidates train on GPUs where that is one.

    Raises:
        ConfigError: the cluster can't be used.
    """
    if on_ray is None:
        yield {}
        return
    with connected() as ray:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        share = share_of(nodes, on_gpus=device.type != "cpu")
        if device.type != "cpu" and not share.gpus:
            raise ConfigError(
                f"{ADDRESS}: no node of this cluster has a GPU, and the run is finished here on {device.type}; set "
                "model.device: cpu, so that candidates and run train on one kind of device"
            )
        many = "1 node" if len(nodes) == 1 else f"{len(nodes)} nodes"
        say(console, f"{ADDRESS} is set: candidates train on its Ray cluster ({many}), each with {share}.")
        told = {"on_sent": partial(_tell_sent, console), "on_done": partial(_tell_done, console)}
        yield {"config": on_ray, "ray": ray, "share": share, **told}


def _tell_sent(console: Console, one: Stretch) -> None:
    numbers = ", ".join(f"{key} {value:g}" for key, value in one.values.items())
    say(console, f"candidate {one.number}: {numbers}: to step {one.steps}")


def _tell_done(console: Console, one: Stretch, answer: Mapping[str, Any]) -> None:
    came = "stopped" if answer["loss"] is None else f"loss {answer['loss']:.4f} at step {one.steps}"
    say(console, f"candidate {one.number}: {came}, on {answer['host']}")
