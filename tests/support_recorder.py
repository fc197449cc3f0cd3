"""`pytest --support-matrix FILE` runs the tests that support_claims.yaml names, alone, and writes how each ended.

Where there is a CUDA device, a test counts if it used it, or failed.

`python tools/write_docs.py --support FILE` makes docs/reference/support.md of it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

CLAIMS = Path(__file__).with_name("support_claims.yaml")
ON_CUDA = "used a CUDA device"


class SupportRecorder:
    """Keeps the outcome of each claimed test. A test with several cases passes only if all of its cases do."""

    def __init__(self, file: Path, *, writes: bool = True) -> None:
        self.file, self.writes = file, writes  # of several processes (pytest-xdist) the first writes
        self.claimed = claimed_tests()
        self.outcomes: dict[str, str] = {}

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        kept = [item for item in items if self._of(item.nodeid)]
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = kept

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Generator[None]:
        """Note that a test took memory of the CUDA device: it says something of that device."""
        if not torch.cuda.is_available():
            return (yield)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        try:
            return (yield)
        finally:
            if torch.cuda.max_memory_allocated() > before:
                item.user_properties.append((ON_CUDA, True))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        used = not torch.cuda.is_available() or ON_CUDA in dict(report.user_properties)
        if not used and report.outcome != "failed":
            return
        if report.when != "call" and report.outcome == "passed":
            return
        for test in self._of(report.nodeid):
            worst = ("failed", "skipped", "passed")
            self.outcomes[test] = min(self.outcomes.get(test, "passed"), report.outcome, key=worst.index)

    def pytest_sessionfinish(self) -> None:
        if not self.writes:
            return
        cuda = torch.cuda.is_available()
        kept = {"date": time.strftime("%Y-%m-%d"), "machine": machine(), "tests": dict(sorted(self.outcomes.items()))}
        self.file.write_text(json.dumps({"cuda" if cuda else "cpu": kept}, indent=1) + "\n", encoding="utf-8")

    def _of(self, nodeid: str) -> list[str]:
        return [test for test in self.claimed if nodeid == test or nodeid.startswith(f"{test}[")]


def claimed_tests() -> list[str]:
    """Every test that a claim names."""
    tree: dict[str, dict[str, list[str]]] = yaml.safe_load(CLAIMS.read_text(encoding="utf-8"))
    return list(dict.fromkeys(test for models in tree.values() for tests in models.values() for test in tests))


def machine() -> str:
    """The device, in words."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return "CPU"


def add_option(parser: pytest.Parser) -> None:
    parser.addoption("--support-matrix", metavar="FILE", type=Path, help="run what support_claims.yaml names; record")


def register(config: Any) -> None:
    file = config.getoption("--support-matrix")
    if file is not None:
        config.pluginmanager.register(SupportRecorder(file, writes=not hasattr(config, "workerinput")))
