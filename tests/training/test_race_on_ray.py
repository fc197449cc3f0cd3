"""A race on a Ray cluster: what it finds is what it finds without one, whatever happens to its nodes and processes."""

from __future__ import annotations

import io
import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from rich.console import Console

from helpers import TINY, tiny_config
from phinetune.api.tune import tune_config
from phinetune.config.run import RunConfig
from phinetune.errors import ConfigError
from phinetune.ray_cluster import Share, connected, share_of
from phinetune.training.race_field import Wish
from ray_nodes import two_nodes
from training.test_race import adapter, tree_of

WISH = Wish(trials=4, rates=(1e-2, 5e-3, 2e-2), ranks=(2,))


def config_of(chats: Path, folder: Path, **training: Any) -> RunConfig:
    """Twelve steps with dropout, so that random numbers count."""
    config = tiny_config(chats, folder, **{"max_steps": 12, "learning_rate": 1e-2, **training})
    config.peft_config["lora_dropout"] = 0.1
    config.evaluation.enabled = False
    return config


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    with two_nodes() as address:
        yield address


@pytest.fixture(scope="module")
def alone(chats: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same tune without a cluster. Read it, don't write into it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        folder = tmp_path_factory.mktemp("alone") / "run"
        return tune_config(config_of(chats, folder), WISH, Console(file=io.StringIO())).path
    finally:
        torch.set_num_threads(threads)


def assert_same(run: Path, other: Path) -> None:
    one, two = adapter(run), adapter(other)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert tree_of(run) == tree_of(other)


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_a_tune_on_two_nodes_finds_what_one_machine_finds(
    chats: Path, tmp_path: Path, alone: Path, cluster: str
) -> None:
    file = io.StringIO()
    run = tune_config(config_of(chats, tmp_path / "run"), WISH, Console(file=file, width=200))
    assert_same(run.path, alone)
    shown = file.getvalue()
    assert "RAY_ADDRESS is set: candidates train on its Ray cluster (2 nodes), each with 1 processor." in shown
    sent, first = shown.index("candidate 1: learning_rate"), shown.index("candidate 0: loss")
    assert sent < first, "two at a time"
    assert re.search(r"candidate 0: loss \d\.\d+ at step 2, on ", shown)


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_a_worker_that_is_killed_and_a_tune_that_is_stopped_lose_nothing(
    chats: Path, tmp_path: Path, alone: Path, cluster: str
) -> None:
    config = config_of(chats, tmp_path / "run")
    killed: list[int] = []
    killer = threading.Thread(target=_kill_a_worker, args=(killed,))
    killer.start()
    run = tune_config(config, WISH, Console(file=io.StringIO()))
    killer.join()
    assert killed, "a worker was killed"
    assert_same(run.path, alone)

    config = config_of(chats, tmp_path / "stopped")
    stopper = threading.Thread(target=_stop_this, args=(tmp_path / "stopped-tune",))
    stopper.start()
    stopped = tune_config(config, WISH, Console(file=io.StringIO()))
    stopper.join()
    assert stopped.stopped
    assert not (tmp_path / "stopped-tune" / "stop").exists()
    assert_same(tune_config(config, WISH, Console(file=io.StringIO())).path, alone)


def _wait_for(found: Any, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not found() and time.monotonic() < end:
        time.sleep(0.02)


def _workers() -> list[psutil.Process]:
    return [one for one in psutil.process_iter(["cmdline"]) if "ray::candidate" in " ".join(one.info["cmdline"] or [])]


def _kill_a_worker(killed: list[int]) -> None:
    _wait_for(_workers)
    for worker in _workers()[:1]:
        worker.kill()
        killed.append(worker.pid)


def _stop_this(folder: Path) -> None:
    _wait_for((folder / "candidate-0").exists)
    _wait_for(_workers)
    os.kill(os.getpid(), signal.SIGTERM)


def test_rows_in_memory_do_not_travel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import phinetune

    monkeypatch.setenv("RAY_ADDRESS", "here:1")
    rows = [{"prompt": f"{i}?", "completion": str(i)} for i in range(20)]
    with pytest.raises(ConfigError, match=r"memory, which a Ray cluster does not see; write it to a file"):
        phinetune.tune(TINY, {"train": rows, "eval": 0.2}, training_config={"output_dir": str(tmp_path / "a")})


@pytest.mark.parametrize(
    ("nodes", "on_gpus", "share"),
    [
        ([{"CPU": 4.0}, {"CPU": 2.0}, {"memory": 1e9}], True, Share(2)),
        ([{"CPU": 16.0, "GPU": 4.0}, {"CPU": 2.0}], True, Share(4, 1)),
        ([{"CPU": 16.0, "GPU": 4.0}, {"CPU": 2.0}], False, Share(2)),
        ([{"CPU": 2.0, "GPU": 8.0}], True, Share(1, 1)),
    ],
)
def test_a_training_takes_a_node_or_a_gpu_with_its_part_of_one(
    nodes: list[dict[str, float]], on_gpus: bool, share: Share
) -> None:
    assert share_of(nodes, on_gpus=on_gpus) == share


def test_a_cluster_without_processors_and_one_that_is_not_there_are_sentences(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "here:1")
    with pytest.raises(ConfigError, match=r"RAY_ADDRESS=here:1: no node of this cluster gives Ray a processor"):
        share_of([{"memory": 1.0}], on_gpus=True)
    pytest.importorskip("ray")
    for address in ("127.0.0.1:1", "ray://127.0.0.1:1"):
        monkeypatch.setenv("RAY_ADDRESS", address)
        with pytest.raises(ConfigError, match=f"RAY_ADDRESS={address}: no cluster is there: "), connected():
            pass
