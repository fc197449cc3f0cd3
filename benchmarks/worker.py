"""One measurement in a process of its own: `python -m benchmarks.worker KIND JSON` prints one JSON line.

Kinds: `trl` (TRL's SFTTrainer with PEFT), `phinetune` (a whole run of this project), `step` (forward and backward of
one step of made-up tokens, by either engine), `paired` (steps of several engines in turn, products between them),
`generate` (greedy answers to prompts, by transformers or by this project), `llama` (by llama.cpp), `dpo` (TRL's
DPOTrainer or this project), `merge` (an adapter into its base), `copy` (that base's folder).
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.greedy_answers import generate, llama
from benchmarks.one_step import paired, step
from benchmarks.preferences import one as dpo
from benchmarks.whole_run import PEAKS, peak_gb, phinetune, trl


def merge(adapter: str, base: str, out: str) -> dict[str, Any]:
    """The adapter merged into the base, in the dtype of the base's files, synced to disk."""
    from phinetune.exporting.merge.merge import merge_run

    del base
    start = time.perf_counter()
    made = merge_run(adapter, out)
    return {"seconds": time.perf_counter() - start, "bytes": made.size}


def copy(adapter: str, base: str, out: str) -> dict[str, Any]:
    """The base's folder copied, synced to disk as a merge is."""
    from phinetune.files import sync_tree

    del adapter
    start = time.perf_counter()
    shutil.copytree(base, out)
    sync_tree(Path(out))
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "bytes": sum(file.stat().st_size for file in Path(out).iterdir())}


KINDS = {
    "trl": trl,
    "phinetune": phinetune,
    "step": step,
    "paired": paired,
    "merge": merge,
    "copy": copy,
    "generate": generate,
    "llama": llama,
    "dpo": dpo,
}


def main() -> None:
    """Run the kind named on the command line and print what it gave, with this process's peak memory."""
    torch.set_num_threads(2)
    result = KINDS[sys.argv[1]](**json.loads(sys.argv[2]))
    last = peak_gb()
    if PEAKS:
        result |= {**PEAKS, "training_gb": last}
    result.setdefault("peak_gb", max(last, *PEAKS.values()) if PEAKS else last)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
