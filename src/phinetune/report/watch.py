"""A run's page served live on this machine's loopback while the run trains."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from phinetune.errors import PhinetuneError
from phinetune.report.facts import read_run
from phinetune.report.page import run_page
from phinetune.run_folder import METRICS, REPORT, SAMPLES

ADDRESS = "127.0.0.1"
OWN_NAMES = (ADDRESS, "localhost")
STALE = 10.0  # seconds after which the page is made anew though no file changed: a process may have ended


def make_server(path: str | Path, port: int) -> ThreadingHTTPServer:
    """A server of the run's page, bound to the loopback; port 0 takes any that is free.

    Raises:
        PhinetuneError: no run at `path`, or the port can't be had.
    """
    page = _Page(read_run(path).path)
    try:
        return ThreadingHTTPServer((ADDRESS, port), _handler(page))
    except OverflowError:
        raise PhinetuneError(f"--port {port}: a port is a number from 0 to 65535") from None
    except OSError as error:
        why = "is taken" if error.errno == errno.EADDRINUSE else f"can't be had ({error.strerror})"
        raise PhinetuneError(
            f"port {port} of {ADDRESS} {why}; name another with --port, or --port 0 for any that is free"
        ) from None


class _Page:
    """The page, made anew only when a file of the run has changed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._made: tuple[Any, float, str] | None = None

    def __call__(self) -> str:
        seen, now = self._seen(), time.monotonic()
        if self._made is None or self._made[0] != seen or now - self._made[1] > STALE:
            self._made = (seen, now, run_page(read_run(self.folder), live=True))
        return self._made[2]

    def _seen(self) -> list[tuple[str, int, int]]:
        files = [*self.folder.glob("*.json"), self.folder / METRICS, self.folder / SAMPLES]
        stats = [(file.name, file.stat()) for file in files if file.is_file()]
        return sorted((name, stat.st_mtime_ns, stat.st_size) for name, stat in stats)


def _handler(page: Callable[[], str]) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            # A page elsewhere could point its own name at this address and read a run; it can't forge this header.
            host = self.headers.get("Host", "").rpartition(":")[0] or self.headers.get("Host", "")
            if host not in OWN_NAMES:
                self._answer(403, "phinetune watch answers to 127.0.0.1 and localhost only.", "text/plain")
            elif self.path.partition("?")[0] != "/":
                self._answer(404, "There is one page here: /", "text/plain")
            else:
                self._answer_with_page()

        def _answer_with_page(self) -> None:
            try:
                text = page()
            except (PhinetuneError, OSError) as error:  # the run is being replaced, or was moved
                self._answer(503, str(error), "text/plain")
            else:
                self._answer(200, text, "text/html")

        def _answer(self, status: int, text: str, kind: str) -> None:
            body = text.encode()
            self.send_response(status)
            self.send_header("Content-Type", f"{kind}; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Cache-Control", "no-store")
            self.send_header("X-Content-Type-Options", "nosniff")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            """Not a line a request on the terminal."""

    return Handler


def watch(path: str | Path, port: int, say: Callable[[str], None]) -> None:
    """Serve until Ctrl-C.

    Raises:
        PhinetuneError: no run at `path`, or the port can't be had.
    """
    with make_server(path, port) as server:
        server.daemon_threads = True
        say(f"{path} live at http://{ADDRESS}:{server.server_address[1]}/ (this machine only); Ctrl-C ends it")
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            say(f"Ended. `phinetune report {path}` writes the page as {Path(path) / REPORT}.")
