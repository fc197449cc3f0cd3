"""What is computed of a reference is kept while it is computed, so that a process that ends loses a minute of it.

The parts lie beside the entry that they will be, and go when it is there.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow
import torch
from torch import Tensor

from phinetune import processes
from phinetune.data.prepare.cache import is_whole
from phinetune.errors import reason_of
from phinetune.files import staged_folder
from phinetune.home import cache_folder
from phinetune.manifest import write_manifest

logger = logging.getLogger(__name__)

EVERY_S = 60.0  # seconds of work that are lost at most
FILE = "reference.arrow"


def write_numbers(folder: Path, numbers: Tensor) -> None:
    """Write numbers, shape (rows, columns), in float32."""
    table = pyarrow.table({"numbers": numbers.reshape(-1).numpy()})
    with pyarrow.OSFile(str(folder / FILE), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)


def read_numbers(folder: Path, columns: int) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
    """What `write_numbers` wrote, shape (rows, columns)."""
    with pyarrow.OSFile(str(folder / FILE), "rb") as file, pyarrow.ipc.open_stream(file) as reader:
        flat = reader.read_all().column("numbers").to_numpy()
    return np.asarray(flat, dtype=np.float32).reshape(-1, columns)


class Parts:
    """The numbers of a reference as far as they are known.

    Args:
        key: of the entry that they will be.

    Attributes:
        found: shape (rows, columns); NaN where nothing is known. Whoever computes writes here.
    """

    def __init__(self, key: str, rows: int, columns: int) -> None:
        self._key, self._kept_at = key, time.monotonic()
        self._own = cache_folder() / "data" / f"{key}.part-{processes.rank()}"
        self.found = torch.full((rows, columns), torch.nan)
        for folder in self._folders():
            if is_whole(folder):
                before = torch.from_numpy(read_numbers(folder, columns).copy())
                self.found = before.where(self.found.isnan(), self.found) if len(before) == rows else self.found
        known = len(self.found) - int(self.found.isnan().any(1).sum())
        if known:
            told = "the reference's log-probabilities of %s of %s rows were computed before"
            logger.info(told, f"{known:,}", f"{rows:,}")

    def _folders(self) -> Iterator[Path]:
        return self._own.parent.glob(f"{self._key}.part-*")

    def knows(self, places: list[int]) -> bool:
        """Whether the numbers of these rows are known."""
        return not bool(self.found[places].isnan().any())

    def keep(self, *, now: bool = False) -> None:
        """Keep what is known on disk, where that was not done for a while.

        Args:
            now: do it at once.
        """
        if now or time.monotonic() - self._kept_at >= EVERY_S:
            try:
                with staged_folder(self._own, private=True) as stage:
                    write_numbers(stage, self.found)
                    write_manifest(stage)
            except OSError as error:  # the run goes on: this was for the case that it does not
                logger.warning("the reference's log-probabilities so far are not kept: %s", reason_of(error))
            self._kept_at = time.monotonic()

    def drop(self) -> None:
        """Delete what was kept."""
        for folder in self._folders():
            shutil.rmtree(folder, ignore_errors=True)
