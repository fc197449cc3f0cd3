"""llama.cpp over one GGUF file, in a process of its own: `python -m phinetune.serving.answers.llama_cpp.process`.

Whatever happens in it, the server goes on. It reads what to serve from standard input, as one line of JSON, and writes
one line: `url`, or `problem`. It ends when its input ends, so it never outlives the server.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from typing import Any


def settings(wish: Mapping[str, Any]) -> Any:
    """llama.cpp's own settings.

    Args:
        wish: `file`, `slots`, `tokens` of each of these, `threads`, and the `key` that a client has to know.
    """
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.port, params.api_keys = wish["file"], 0, [wish["key"]]
    params.n_parallel, params.n_ctx = wish["slots"], wish["slots"] * wish["tokens"]
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = wish["threads"]
    params.cache_ram_mib = 0  # it would hold eight gigabytes of ended conversations
    params.n_gpu_layers, params.verbosity, params.ui = 0, 0, False
    return params


def main() -> None:
    """Serve until the input ends. What llama.cpp prints goes to standard error."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    wish = json.loads(sys.stdin.readline())
    try:
        import xllamacpp

        server = xllamacpp.Server(settings(wish))
        reply = {"url": server.listening_address}
    except Exception as error:  # whatever the library raises, its user is to read it
        reply = {"problem": " ".join(str(error).split()) or type(error).__name__}
    replies.write(json.dumps(reply) + "\n")
    replies.flush()
    if "url" in reply:
        sys.stdin.read()
    os._exit(0)  # requests that are under way would hold an ordinary end up


if __name__ == "__main__":
    main()
