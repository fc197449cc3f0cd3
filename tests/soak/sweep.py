"""Fails every file operation of a short run in turn, kills the run there, or loses what it had not flushed.

    python tests/soak/sweep.py [--form plain] [--faults ENOSPC,KILL,…] [--seed 0] [--most N] [--at N] [--journal FILE]

After each fault the run goes on with `--resume`. Its adapter, metrics and results must then be those of a run that was
never disturbed, to the bit; or the program must have refused in a sentence, with everything written before still there.
A process that has imported everything and made one run forks for each run, so that a case takes about a second. A disk
that is as an earlier fault left it is counted, and not gone on from again. With `--at` and one fault, one case
is run again. With `--journal`, a sweep that was cut off goes on where it was, as long as the program is the same.
"""

from __future__ import annotations

import argparse
import ctypes
import errno
import faulthandler
import gc
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from soak.disk_state import Disk, read_log  # noqa: E402
from soak.journal import Journal  # noqa: E402
from soak.outcome import REFUSED, Ended, first_difference, innermost, unlike_a_sentence, without_clock  # noqa: E402

SHIM = "PHINETUNE_FAULTS"
# How faults.c is told: kind, errno.
FAULTS: dict[str, tuple[int, int]] = {
    "ENOSPC": (1, errno.ENOSPC),
    "EIO": (1, errno.EIO),
    "EINTR": (1, errno.EINTR),
    "SHORT": (2, 0),
    "KILL": (4, 0),
    "LOST": (4, 0),  # killed, and what was not flushed is lost: names kept
    "LOST-NAMES": (4, 0),  # … and names that were not flushed are lost, too
    "MEMORY": (0, 0),  # an allocation fails, none of a file's operations
}
# What is left of names after a kill, as Disk.write calls it; nothing is lost after a mere KILL.
KEPT = {"KILL": "", "LOST": "all", "LOST-NAMES": "flushed"}
TENSORS = {".safetensors", ".pt", ".pth", ".bin"}
LARGE = 64_000  # bytes of an allocation that is made to fail; smaller ones are of the libraries' housekeeping
MOST_SECONDS = 300  # of one run, on a busy machine
TINY = "random:{layers: 2, hidden_size: 32, intermediate_size: 64, heads: 4, kv_heads: 2, vocab: 300}"


@dataclass(frozen=True)
class Fault:
    """What happens at one operation; `at` 0 is nothing."""

    name: str = "KILL"
    at: int = 0
    reads: bool = False

    def __str__(self) -> str:
        what = "allocation" if self.name == "MEMORY" else "read" if self.reads else "operation"
        return f"{self.name} at {what} {self.at}"


@dataclass(frozen=True)
class Pick:
    """Which cases: those at one operation, or `most` of all drawn by `seed`, or all."""

    seed: int = 0
    most: int | None = None
    at: int | None = None

    def of(self, cases: list[Fault]) -> list[Fault]:
        if self.at is not None:
            return [case for case in cases if case.at == self.at]
        return cases if self.most is None else random.Random(self.seed).sample(cases, min(self.most, len(cases)))


@dataclass
class Report:
    """What a sweep found."""

    operations: int
    reads: int
    allocations: int
    cases: int = 0
    refused: int = 0
    states: int = 0
    ended_by_libraries: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)


def build_shim(folder: Path) -> Path:
    """The compiled injector."""
    library = folder / "faults.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", str(library), str(HERE / "faults.c"), "-ldl"], check=True)
    return library


class Sweep:
    """One form of a run in a folder, and what an undisturbed run of it leaves."""

    def __init__(self, place: Path, form: str) -> None:
        self.place, self.root = place, place / "root"
        self.shim = ctypes.CDLL(os.environ[SHIM])
        self.shim.faults_seen.restype = self.shim.faults_allocations.restype = ctypes.c_long
        self.shim.faults_arm_memory.argtypes = [ctypes.c_long, ctypes.c_long]
        self.config = self._write_config(form)
        self.went_on: set[str] = set()  # states of the disk
        self.ended_by_libraries: Counter[str] = Counter()  # without memory, by the place of the call
        self._killed: tuple[int, Ended, Disk] | None = None
        self._warm_up()

    def _warm_up(self) -> None:
        """One run in this process, so that those that it forks find modules, patterns and tables already there."""
        _import_all()
        self.clear()
        kept = [os.dup(1), os.dup(2)]
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1), os.dup2(nowhere, 2)
        status = _train(self.config)
        sys.stdout.flush(), sys.stderr.flush()
        os.dup2(kept[0], 1), os.dup2(kept[1], 2)
        if status:
            raise SystemExit("the run fails without a fault; see phinetune train")
        gc.collect()
        gc.freeze()  # a collection in a forked process leaves what came with it alone

    def _write_config(self, form: str) -> Path:
        rows = [
            {"messages": [{"role": "user", "content": f"How many are {i} and {i}?" + " Please." * (i % 5)},
                          {"role": "assistant", "content": f"They are {2 * i}."}]}
            for i in range(12)
        ]  # fmt: skip
        data = self.place / "chats.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        tree: dict[str, Any] = {
            "model": {"path": TINY, "dtype": "float32"},
            "data": {"train": str(data), "eval": 0.25},
            "peft_config": {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1},
            "training_config": {
                "output_dir": str(self.root / "run"),
                "max_steps": 4,
                "per_device_train_batch_size": 2,
                "gradient_accumulation_steps": 2,
                "learning_rate": 1e-2,
                "logging_steps": 1,
                "save_steps": 2,
                "eval_strategy": "steps",
                "eval_steps": 2,
                "save_total_limit": 1,
                "load_best_model_at_end": True,
                "gradient_checkpointing": False,
            },
            "evaluation": {"max_new_tokens": 4, "max_prompts": 2, "fixed_prompts": 1},
        }
        if form == "packed":
            tree["data"]["packing"] = "tokens"
            tree["training_config"]["max_length"] = 200
        if form == "nf4":
            tree["model"]["quantization"] = "nf4"
        file = self.place / "run.yaml"
        file.write_text(json.dumps(tree))
        return file

    def run(self, *options: str, fault: Fault | None = None, log: Path | None = None) -> Ended:
        """`phinetune train` in a forked process, with a fault."""
        output, numbers = self.place / "output.txt", self.place / "seen.txt"
        numbers.unlink(missing_ok=True)
        child = os.fork()
        if child == 0:
            self._in_child(options, fault or Fault(), log, output, numbers)
        _, status = os.waitpid(child, 0)
        seen = int(numbers.read_text()) if numbers.is_file() else 0
        return Ended(os.waitstatus_to_exitcode(status), output.read_text(errors="replace"), seen)

    def _in_child(self, options: Sequence[str], fault: Fault, log: Path | None, output: Path, numbers: Path) -> None:
        handle = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(handle, 1), os.dup2(handle, 2)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
        kind, number = FAULTS[fault.name]
        path = str(log).encode() if log else b""
        status = 1
        try:
            faulthandler.enable(handle)  # tells where a library ended the process
            signal.alarm(MOST_SECONDS)
            if fault.name == "MEMORY":
                self.shim.faults_arm_memory(fault.at, LARGE)
            else:
                self.shim.faults_arm(str(self.root).encode(), path, fault.at, kind, number, int(fault.reads))
            status = _train(self.config, *options)
        except BaseException:  # as the interpreter does: a traceback and status 1
            traceback.print_exc()
        finally:
            self.shim.faults_disarm()
            allocations = self.shim.faults_allocations()
            numbers.write_text(str(allocations if fault.name == "MEMORY" else self.shim.faults_seen()))
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(status)

    def clear(self) -> None:
        """An empty root."""
        shutil.rmtree(self.root, ignore_errors=True)
        self.root.mkdir(parents=True)

    def left(self) -> dict[str, Any]:
        """What the run left: adapter, metrics, results, without what a clock decides."""
        run = self.root / "run"
        lines = (run / "metrics.jsonl").read_text().splitlines()
        return {
            "adapter": (run / "adapter_model.safetensors").read_bytes(),
            "metrics": [without_clock(json.loads(line)) for line in lines],
            "results": without_clock(json.loads((run / "results.json").read_text())),
        }

    def case(self, fault: Fault, expected: dict[str, Any]) -> tuple[list[str], bool]:
        """One fault, then `--resume` (a new start where nothing had begun) unless an earlier case went on from the same
        disk. Returns what is wrong, and whether the run was refused in a sentence."""
        ended = self._disturbed(fault)
        if fault.name == "MEMORY" and ended.status in (-signal.SIGABRT, -signal.SIGSEGV):
            problems = []
            self.ended_by_libraries[innermost(ended.text)] += 1  # what is written must be whole all the same
        else:
            problems = unlike_a_sentence(ended)
        if ended.status == 0:
            return problems + self._unlike(expected), False
        state = self.state()
        if state not in self.went_on:
            self.went_on.add(state)
            problems += self._go_on(expected)
        return problems, ended.status in REFUSED

    def _disturbed(self, fault: Fault) -> Ended:
        """A run with a fault, and the disk as the fault leaves it. One killed run serves the three kinds of kills."""
        kept = None if fault.reads else KEPT.get(fault.name)
        if not kept or self._killed is None or self._killed[0] != fault.at:
            self.clear()
            disk, log = Disk.of(self.root), self.place / "log.bin"
            ended = self.run(fault=fault, log=None if kept is None else log)
            if kept is None:
                return ended
            for operation in read_log(log):
                disk.apply(operation)
            self._killed = fault.at, ended, disk
        _, ended, disk = self._killed
        if kept:
            disk.write(kept)
        return ended

    def state(self) -> str:
        """What tells a state of the disk from others, whatever the clock, the process and the names of temporary files:
        a hash of all names and bytes, with a figure in a text counted as any other figure."""
        all_of_it = hashlib.sha256()
        for place in sorted(self.root.rglob("*")):
            name = re.sub(r"(\.partial-|\.tmp)\w+", r"\1", str(place.relative_to(self.root)))
            held = place.read_bytes() if place.is_file() else b"/"
            if place.suffix not in TENSORS:
                held = re.sub(rb"[0-9a-f]{64}|[0-9.e+-]+", b"0", held)
            all_of_it.update(f"{name} {len(held)} ".encode() + held)
        return all_of_it.hexdigest()

    def _go_on(self, expected: dict[str, Any]) -> list[str]:
        again = self.run("--resume")
        if again.status == 2 and "no run to go on with" in again.text:
            again = self.run()
        problems = unlike_a_sentence(again)
        if again.status == 0:
            return problems + self._unlike(expected)
        return [*problems, f"could not go on: {again.text.strip()[-400:]}"]

    def _unlike(self, expected: dict[str, Any]) -> list[str]:
        try:
            left = self.left()
        except (OSError, ValueError) as error:
            return [f"the run says that it has ended, but: {error}"]
        return [f"other {name}: {first_difference(left[name], expected[name])}" for name in expected
                if left[name] != expected[name]]  # fmt: skip


def _train(config: Path, *options: str) -> int:
    """`phinetune train`, as the command line starts it. Returns its exit status."""
    from phinetune.cli.app import main

    sys.argv = ["phinetune", "train", str(config), *options]
    try:
        main()
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else 0 if error.code is None else 1
    return 0


def _import_all() -> None:
    """Import what a run imports, so that a forked process need not."""
    import torch

    torch.set_num_threads(1)
    import peft  # noqa: F401
    import trl  # noqa: F401

    import phinetune.api.train
    import phinetune.cli.app  # noqa: F401


def sweep(place: Path, form: str, faults: Sequence[str], pick: Pick, journal: Path | None = None) -> Report:
    """All cases of a form, or those that are picked; those of the journal are not tried again."""
    made = Sweep(place, form)
    expected, report, cases = _undisturbed(made, faults, pick)
    kept = Journal(journal, form, report.operations)
    made.went_on.update(entry["state"] for entry in kept.done.values() if entry["state"])
    began = time.monotonic()
    for case in cases:
        entry = kept.done.get(str(case)) or _tried(made, case, expected, kept)
        report.cases += 1
        report.refused += entry["refused"]
        report.states += bool(entry["state"])
        report.problems += [f"{form}: {case}: {problem}" for problem in entry["problems"]]
        report.ended_by_libraries.update(entry["ended_by"])
        if entry["problems"]:
            print(f"{form}: {case}:\n  " + "\n  ".join(entry["problems"]), flush=True)
        if report.cases % 100 == 0:
            took = f"{report.states} states, {time.monotonic() - began:.0f} s"
            print(f"{form}: {report.cases} of {len(cases)} cases, {took}", flush=True)
    return report


def _undisturbed(made: Sweep, faults: Sequence[str], pick: Pick) -> tuple[dict[str, Any], Report, list[Fault]]:
    """What an undisturbed run leaves, how many places it has where a fault can be, and the cases of those."""
    made.clear()
    log = made.place / "undisturbed.bin"
    undisturbed = made.run(log=log)
    if undisturbed.status:
        raise SystemExit(f"the undisturbed run failed:\n{undisturbed.text}")
    expected = made.left()
    made.clear()
    reads = made.run(fault=Fault(reads=True)).seen
    made.clear()
    allocations = made.run(fault=Fault("MEMORY")).seen
    report = Report(undisturbed.seen, reads, allocations)
    return expected, report, pick.of(_cases(faults, report, _writes(log)))


def _tried(made: Sweep, case: Fault, expected: dict[str, Any], journal: Journal) -> dict[str, Any]:
    """One case, and what the journal keeps of it: `state` is the disk that the run went on from, if it was new."""
    states, ended = set(made.went_on), Counter(made.ended_by_libraries)
    problems, refused = made.case(case, expected)
    entry = {
        "problems": problems,
        "refused": refused,
        "state": next(iter(made.went_on - states), None),
        "ended_by": list((made.ended_by_libraries - ended).elements()),
    }
    journal.add(str(case), **entry)
    return entry


def _writes(log: Path) -> set[int]:
    """The numbers of the operations that can be cut short: writes of two bytes and more."""
    return {one.number for one in read_log(log) if one.kind == "w" and len(one.data) > 1}


def _cases(faults: Sequence[str], seen: Report, writes: set[int]) -> list[Fault]:
    """Each fault at each operation; the three kinds of kills at one operation follow one another."""
    kills = [name for name in KEPT if name in faults]
    numbers = range(1, seen.operations + 1)
    cases = [Fault(name, i) for i in numbers for name in kills]
    for name in faults:
        if name == "MEMORY":
            cases += [Fault(name, i) for i in range(1, seen.allocations + 1)]
        elif name not in KEPT:
            cases += [Fault(name, i) for i in numbers if name != "SHORT" or i in writes]
    return cases + [Fault("EIO", i, reads=True) for i in range(1, seen.reads + 1) if "EIO" in faults]


def main() -> None:
    """Compile the injector, start again with it, run the sweep, say what was found; status 1 if anything was."""
    cli = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    cli.add_argument("--form", default="plain", choices=["plain", "packed", "nf4"])
    cli.add_argument("--faults", default=",".join(FAULTS))
    cli.add_argument("--seed", type=int, default=0)
    cli.add_argument("--most", type=int)
    cli.add_argument("--at", type=int)
    cli.add_argument("--journal", type=Path, help="a file that keeps what is done; the same call goes on there")
    given = cli.parse_args()
    with tempfile.TemporaryDirectory(prefix="phinetune-sweep-") as folder:
        if SHIM not in os.environ:
            library = str(build_shim(Path(folder)))
            own = {SHIM: library, "LD_PRELOAD": library, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
            done = subprocess.run([sys.executable, __file__, *sys.argv[1:]], env={**os.environ, **own})
            raise SystemExit(done.returncode)
        pick = Pick(given.seed, given.most, given.at)
        report = sweep(Path(folder), given.form, given.faults.split(","), pick, given.journal)
    print(
        f"{given.form}, seed {given.seed}: {report.operations} operations, {report.reads} reads and "
        f"{report.allocations} large allocations; "
        f"{report.cases} cases, {report.refused} refused in a sentence, "
        f"{report.states} states of the disk gone on from, {len(report.problems)} problems"
    )
    for place, count in report.ended_by_libraries.most_common():
        print(f"  {count} ended by a library that had no memory, and gone on from: {place}")
    raise SystemExit(bool(report.problems))


if __name__ == "__main__":
    main()
