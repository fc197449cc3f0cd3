"""Thousands of odd requests, made by schemathesis from the server's own description: none may get a 500, or hang.

    python tests/soak/serve_schemas.py --minutes 5

It needs `schemathesis` (phinetune[fuzz]): beside this Python, on the path, or named by --schemathesis. Without it,
this says so and does nothing.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

from helpers import chat  # noqa: E402
from serving.serving_helpers import ServerProcess, ask  # noqa: E402

LONGEST_S = 60  # that an answer may take: an upload waits until the libraries are loaded


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--schemathesis", default=_found())
    given = parser.parse_args()
    if not given.schemathesis:
        print("schemathesis is not installed (pip install 'phinetune[fuzz]'); no odd requests are tried")
        return 0
    server = ServerProcess(Path(tempfile.mkdtemp(prefix="serve-schemas-")) / "server")
    client = server.start()
    try:
        client.files.create(file=("rows.jsonl", _rows()), purpose="fine-tune")
        place = server.url.removesuffix("/v1")
        command = [
            *(given.schemathesis, "run", f"{place}/openapi.json", "--url", place),
            *("--header", f"Authorization: Bearer {server.key}", "--checks", "not_a_server_error"),
            *("--seed", str(given.seed), "--request-timeout", str(LONGEST_S), "--continue-on-failure"),
            *("--max-time", str(int(60 * given.minutes))),
        ]
        status = subprocess.run(command, cwd=server.folder.parent, timeout=60 * given.minutes + 600).returncode
        assert ask(client, "GET", "/healthz")[0] == 200
        return status
    finally:
        server.kill()


def _found() -> str | None:
    """schemathesis of this Python, else the one on the path."""
    own = Path(sys.executable).with_name("schemathesis")
    return str(own) if own.exists() else shutil.which("schemathesis")


def _rows() -> bytes:
    return "".join(json.dumps(chat(f"Say {i}", f"It is {i}.")) + "\n" for i in range(4)).encode()


if __name__ == "__main__":
    sys.exit(main())
