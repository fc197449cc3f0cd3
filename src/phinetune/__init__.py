"""phinetune: fine-tune a Phi-3 with LoRA on your chats, and see whether it got better.

`train`, `evaluate`, `merge`, `push` and `load` are imported when first used, so `import phinetune` costs nothing.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from phinetune.version import VERSION

if TYPE_CHECKING:
    from phinetune.api.train import evaluate, load, merge, push, train

# bitsandbytes, which PEFT imports, warns on processors with AVX512-BF16 of a missing kernel that nothing here calls.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

__version__ = VERSION
__all__ = ["evaluate", "load", "merge", "push", "train"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from phinetune.api import train as api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
