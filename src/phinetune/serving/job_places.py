"""Where a job's files lie: its configuration, what its process prints, and its run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from phinetune.run_folder import RunFolder

HELD = ".from"  # the end of the names of folders that hold a checkpoint for a job


@dataclass(frozen=True)
class JobPlaces:
    """The places of a job in a server's folder."""

    folder: Path
    job: str

    @property
    def config(self) -> Path:
        """What `phinetune train` is called with. Its path is what the job's process is known by."""
        return self.folder / "jobs" / f"{self.job}.yaml"

    @property
    def log(self) -> Path:
        return self.folder / "jobs" / f"{self.job}.log"

    @property
    def held(self) -> Path:
        """The checkpoint that the job goes on from, if it goes on from one."""
        return self.folder / "jobs" / f"{self.job}{HELD}"

    @property
    def run(self) -> RunFolder:
        return RunFolder(self.folder / "runs" / self.job)


RESULTS = "fine-tune-results"  # the purpose of a job's result file


def file_place(folder: Path, file: str, purpose: str = "fine-tune") -> Path:
    """Where a file lies. Only its id is in the name, never what a client wrote."""
    return folder / "files" / f"{file}.{'csv' if purpose == RESULTS else 'jsonl'}"
