"""`python -m benchmarks.startup_worker VERB…`: run phinetune's command up to its first optimizer step, then say in one
JSON line where the time went. Imports nothing but the standard library, so that it adds nothing to what it measures.

A thread looks at the main thread's stack every few milliseconds and puts the time since its last look, and the
processor time of all threads, down to what stands there.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections import defaultdict
from types import FrameType

EVERY = 0.004  # seconds between two looks
# What the time is put down to: the outermost function on the stack that is named here, `file: function`.
PHASES = {
    "config/run.py: load_config": "configuration",
    "training/prepare.py: settle": "settings",
    "api/before.py: look_at_settings": "settings",
    "training/prepare.py: prepare_run": "reading and preparing rows",
    "api/before.py: look_at_rows": "reading and preparing rows",
    "planning/limits.py: check_limits": "probing and planning",
    "screen/data.py: show_data": "showing rows",
    "checkpoints/load.py: load_base": "loading the model",
    "transformers/trainer.py: train": "setting up the loop",
    "training/run.py: train_run": "setting up the trainer",
}
INNER = {  # these count wherever they stand below another
    "engine/kernels/matmul.py: is_slower_than_float32": "probing and planning",
    "transformers/trainer.py: training_step": "forward and backward",
    "checkpoints/load.py: load_base": "loading the model",
}
OTHER = "other"


class Watch:
    """Where the time goes, by phase, and for imports by the library that is being executed."""

    def __init__(self, main: int) -> None:
        self.main = main
        self.phases: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        self.libraries: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        self.last = (time.perf_counter(), 0.0)  # all processor time so far was the interpreter's own start

    def run(self) -> None:
        """Look again and again."""
        hooked = False
        while True:
            time.sleep(EVERY)
            self.look()
            hooked = hooked or self.hook()

    def look(self) -> None:
        """Put down the time since the last look."""
        frame = sys._current_frames().get(self.main)
        now = (time.perf_counter(), time.process_time())
        spent = [new - old for new, old in zip(now, self.last, strict=True)]
        self.last = now
        phase, library = placed(frame)
        for table, key in ((self.phases, phase), (self.libraries, library)):
            if key:
                table[key] = [total + part for total, part in zip(table[key], spent, strict=True)]

    def hook(self) -> bool:
        """Ask torch, once it is loaded, to end the process after the first optimizer step."""
        module = sys.modules.get("torch.optim.optimizer")
        register = getattr(module, "register_optimizer_step_post_hook", None)
        if register is None:
            return False
        register(lambda *_: self.end())
        return True

    def end(self) -> None:
        """Print what was found and end the process."""
        self.look()
        report = {
            "seconds": time.time() - float(os.environ["BEGAN"]),
            "processor_seconds": time.process_time(),
            "phases": self.phases,
            "libraries": self.libraries,
        }
        os.write(int(os.environ["REPORT_TO"]), (json.dumps(report) + "\n").encode())
        os._exit(0)


def placed(frame: FrameType | None) -> tuple[str, str | None]:
    """What a stack is put down to: the phase, and the library if it is an import."""
    phase, library, importing = OTHER, "", False
    while frame is not None:
        file, name = frame.f_code.co_filename, frame.f_code.co_name
        if file.startswith("<frozen importlib"):
            importing = True
        else:
            library = library or package(file)
        at = f"{'/'.join(file.split('/')[-2:])}: {name}"
        deep = f"{'/'.join(file.split('/')[-3:])}: {name}"
        found = PHASES.get(at) or PHASES.get(deep)
        inner = INNER.get(at) or INNER.get(deep)
        if inner:
            phase = inner
            break
        phase = found or phase
        frame = frame.f_back
    return ("imports", library) if importing else (phase, None)


def package(file: str) -> str:
    """The distribution a file belongs to, or `python` for the standard library."""
    for mark in ("site-packages/", "/src/"):
        if mark in file:
            return file.split(mark, 1)[1].split("/")[0].removesuffix(".py")
    return "python"


def main() -> None:
    """Run the command that the arguments name."""
    watch = Watch(threading.main_thread().ident or 0)
    threading.Thread(target=watch.run, daemon=True).start()
    sys.argv = ["phinetune", *sys.argv[1:]]
    from phinetune.cli.app import main as command

    command()


if __name__ == "__main__":
    main()
