"""phinetune: fine-tune a Phi-3 with LoRA on your chats, and see whether it got better.

Each verb of the command line is a function here, with the same defaults. They are imported when first used, so
`import phinetune` costs nothing.
"""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING, Any

from phinetune.cpu_share import share_processor
from phinetune.loading import libraries
from phinetune.version import VERSION

if TYPE_CHECKING:
    from phinetune.api.columns import columns
    from phinetune.api.curve import curve
    from phinetune.api.data import check, preview
    from phinetune.api.evaluate import evaluate, evaluate_tasks
    from phinetune.api.export import export
    from phinetune.api.merge import merge
    from phinetune.api.plan import plan
    from phinetune.api.report import report, watch
    from phinetune.api.talk import chat, generate, load
    from phinetune.api.train import demo, train
    from phinetune.api.tune import tune
    from phinetune.config.run import describe_config
    from phinetune.exporting.combine import combine
    from phinetune.exporting.convert.convert import convert
    from phinetune.exporting.hub.push import push
    from phinetune.serving.serve import serve

share_processor()  # before torch is loaded
# bitsandbytes, which PEFT imports, warns on processors with AVX512-BF16 of a missing kernel that nothing here calls.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

__version__ = VERSION
_PLACES = {
    "chat": "phinetune.api.talk",
    "check": "phinetune.api.data",
    "columns": "phinetune.api.columns",
    "combine": "phinetune.exporting.combine",
    "convert": "phinetune.exporting.convert.convert",
    "curve": "phinetune.api.curve",
    "demo": "phinetune.api.train",
    "describe_config": "phinetune.config.run",
    "evaluate": "phinetune.api.evaluate",
    "evaluate_tasks": "phinetune.api.evaluate",
    "export": "phinetune.api.export",
    "generate": "phinetune.api.talk",
    "load": "phinetune.api.talk",
    "merge": "phinetune.api.merge",
    "plan": "phinetune.api.plan",
    "preview": "phinetune.api.data",
    "push": "phinetune.exporting.hub.push",
    "report": "phinetune.api.report",
    "serve": "phinetune.serving.serve",
    "train": "phinetune.api.train",
    "tune": "phinetune.api.tune",
    "watch": "phinetune.api.report",
}
__all__ = [
    "chat",
    "check",
    "columns",
    "combine",
    "convert",
    "curve",
    "demo",
    "describe_config",
    "evaluate",
    "evaluate_tasks",
    "export",
    "generate",
    "load",
    "merge",
    "plan",
    "preview",
    "push",
    "report",
    "serve",
    "train",
    "tune",
    "watch",
]


def __getattr__(name: str) -> Any:
    if name in _PLACES:
        with libraries(stay=False):
            return getattr(importlib.import_module(_PLACES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
