"""Two hosts on this machine: two network namespaces joined by a veth cable, whose speed tc limits. Needs root.

    sudo python -m benchmarks.two_hosts [--model starter] [--steps 12] [--rates none,1gbit,100mbit] [--fsdp]

Each host runs one process on one core, by torchrun with a rendezvous over the cable. Writes
benchmarks/results/two_hosts/*.json and two_hosts.md: tokens/s, and the bytes that went over the cable in a step,
beside what a ring all-reduce of the adapter's float32 gradients sends: 2 (n - 1) / n of their bytes from each process
(Patarasuk and Yuan 2009).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from benchmarks.machine import machine
from benchmarks.processes import configured, speed
from benchmarks.store import Book, Part, Row

HOSTS = ("pt-host-a", "pt-host-b")
CABLE = ("pt-a", "pt-b")
ADDRESSES = ("10.77.0.1", "10.77.0.2")
PORT = 29571
LATENCY = "50ms"  # that a limited cable holds bytes for at most

BOOK = Book(
    "two_hosts",
    "Two hosts",
    ("cable", "tokens/s", "MB a step", "MB a step by the formula"),
    lambda row: [row["rate"], f"{row['tokens_per_s']:.0f}", f"{row['mb_a_step']:.1f}", f"{row['formula_mb']:.1f}"],
    lambda name, part: f"{part['model']}, {part['steps']} steps, {name}; each host has one process on one core.",
    words=("cable",),
)


def ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout


def inside(host: str, *command: str) -> str:
    return ip("netns", "exec", host, *command)


@contextmanager
def two_hosts() -> Iterator[None]:
    """Two namespaces with a cable between them, which are taken down again."""
    ends = list(zip(HOSTS, CABLE, ADDRESSES, strict=True))
    made: list[str] = []
    try:
        for host in HOSTS:
            ip("netns", "add", host)
            made.append(host)
        ip("link", "add", CABLE[0], "netns", HOSTS[0], "type", "veth", "peer", "name", CABLE[1], "netns", HOSTS[1])
        for host, end, address in ends:
            inside(host, "ip", "addr", "add", f"{address}/24", "dev", end)
            for device in ("lo", end):
                inside(host, "ip", "link", "set", device, "up")
        yield
    finally:
        for host in made:
            ip("netns", "del", host)


def limit(rate: str) -> None:
    """Let each end of the cable send so many bits a second; `none` is no limit."""
    for host, end in zip(HOSTS, CABLE, strict=True):
        subprocess.run(["ip", "netns", "exec", host, "tc", "qdisc", "del", "dev", end, "root"], capture_output=True)
        if rate != "none":
            inside(
                host, "tc", "qdisc", "add", "dev", end, "root", "tbf", "rate", rate, "burst", "256kb",
                "latency", LATENCY,
            )  # fmt: skip


def sent() -> int:
    """The bytes that both ends have sent so far."""
    counts = [
        inside(host, "cat", f"/sys/class/net/{end}/statistics/tx_bytes") for host, end in zip(HOSTS, CABLE, strict=True)
    ]
    return sum(map(int, counts))


def train(model: str, steps: int, fsdp: bool) -> tuple[float, int, int]:
    """Tokens a second, the bytes over the cable from start to end, and the adapter's parameters."""
    cores = sorted(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        file = configured(model, steps, 2, folder, **({"fsdp": True} if fsdp else {}))
        before = sent()
        both = [_start(number, str(file), cores[number % len(cores)], folder / f"log-{number}") for number in range(2)]
        for number, process in enumerate(both):
            if process.wait(3600):
                raise SystemExit((folder / f"log-{number}").read_text()[-3000:])
        start = json.loads((folder / "run" / "start.json").read_text())
        return speed(folder / "run"), sent() - before, int(start["trainable_parameters"])


def _start(number: int, file: str, core: int, log: Path) -> subprocess.Popen[bytes]:
    """One host's launcher. Both write to one folder, as hosts with a shared disk do."""
    torchrun: Sequence[str] = (
        *(sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--node-rank", str(number)),
        *("--nproc-per-node", "1", "--master-addr", ADDRESSES[0], "--master-port", str(PORT)),
        *("-m", "phinetune", "train", file),
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": CABLE[number]}
    command = ["ip", "netns", "exec", HOSTS[number], "taskset", "-c", str(core), *torchrun]
    with log.open("wb") as output:
        return subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)


def measured(model: str, steps: int, rates: Sequence[str], fsdp: bool) -> Part:
    """The same run over cables of different speed. What start and end of a run send is taken off by a shorter run."""
    rows: list[Row] = []
    with two_hosts():
        _, once, _ = train(model, 3, fsdp)
        for rate in rates:
            limit(rate)
            found, bytes_, trained = train(model, steps, fsdp)
            row = {"rate": "unlimited" if rate == "none" else rate, "tokens_per_s": found}
            row |= {"mb_a_step": (bytes_ - once) / (steps - 3) / 1e6, "formula_mb": 2 * trained * 4 / 1e6}
            rows.append(row)
            print(json.dumps(row), file=sys.stderr)
    return {"machine": machine("auto"), "model": model, "steps": steps, "rows": rows}


def main() -> None:
    """Measure and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="starter")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rates", default="none,1gbit,100mbit")
    parser.add_argument("--fsdp", action="store_true")
    given = parser.parse_args()
    part = measured(given.model, given.steps, given.rates.split(","), given.fsdp)
    for row in part["rows"]:
        Console().print(f"{row['rate']}: {row['tokens_per_s']:.0f} tokens/s, {row['mb_a_step']:.1f} MB a step")
    BOOK.keep({"FSDP2" if given.fsdp else "DDP": part})


if __name__ == "__main__":
    main()
