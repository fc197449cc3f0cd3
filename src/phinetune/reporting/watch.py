"""Serves a run's page while the run trains: only to this machine (on the loopback address), and only with its token.

Other users of this machine, and pages from the internet, can reach the loopback address too. The token is in the
address that is printed, and new each time.
"""

from __future__ import annotations

import errno
import secrets
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from phinetune.errors import PhinetuneError
from phinetune.reporting.facts import read_run
from phinetune.reporting.render import run_page
from phinetune.run_folder import METRICS, REPORT, SAMPLES

ADDRESS = "127.0.0.1"
OWN_NAMES = (ADDRESS, "localhost")
STALE = 10.0  # seconds; the page is then made again even if no file has changed, as the run's process may have ended


class PageServer(ThreadingHTTPServer):
    """A server of one page.

    Attributes:
        url: the page's address, with the token.
    """

    daemon_threads = True

    def __init__(self, page: Callable[[], str], port: int) -> None:
        self._token = secrets.token_urlsafe(16)
        super().__init__((ADDRESS, port), _handler(page, f"/{self._token}/"))
        self.url = f"http://{ADDRESS}:{self.server_address[1]}/{self._token}/"


def make_server(path: str | Path, port: int) -> PageServer:
    """A server of the run's page, bound to the loopback address. Port 0 takes any free port.

    Raises:
        PhinetuneError: there is no run at `path`, or the port is not available.
    """
    page = _Page(read_run(path).path)
    try:
        return PageServer(page, port)
    except OverflowError:
        raise PhinetuneError(f"--port {port}: a port is a number from 0 to 65535") from None
    except OSError as error:
        why = "is taken" if error.errno == errno.EADDRINUSE else f"is not available ({error.strerror})"
        raise PhinetuneError(
            f"port {port} of {ADDRESS} {why}; name another with --port, or --port 0 for any that is free"
        ) from None


class _Page:
    """Makes the page when it is called. It keeps the page until a file of the run changes, or for `STALE` seconds."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._made: tuple[Any, float, str] | None = None

    def __call__(self) -> str:
        state, now = self._file_state(), time.monotonic()
        if self._made is None or self._made[0] != state or now - self._made[1] > STALE:
            self._made = (state, now, run_page(read_run(self.folder), live=True))
        return self._made[2]

    def _file_state(self) -> list[tuple[str, int, int]]:
        """Name, time of change in nanoseconds, and size in bytes of each file that the page is made from."""
        files = [*self.folder.glob("*.json"), self.folder / METRICS, self.folder / SAMPLES]
        stats = [(file.name, file.stat()) for file in files if file.is_file()]
        return sorted((name, stat.st_mtime_ns, stat.st_size) for name, stat in stats)


def _handler(page: Callable[[], str], address: str) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            # A page from the internet could make its own host name point to this address, to read the run. But it
            # can't forge this header (DNS rebinding).
            host = self.headers.get("Host", "").rpartition(":")[0] or self.headers.get("Host", "")
            if host not in OWN_NAMES:
                self._answer(403, "phinetune watch answers to 127.0.0.1 and localhost only.", "text/plain")
            elif not secrets.compare_digest(self.path.partition("?")[0].encode(), address.encode()):
                self._answer(404, "There is one page here, at the address that phinetune watch printed.", "text/plain")
            else:
                self._answer_with_page()

        def _answer_with_page(self) -> None:
            try:
                text = page()
            except (PhinetuneError, OSError) as error:  # a new run is replacing this one, or the folder was moved
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
            self.send_header("Referrer-Policy", "no-referrer")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            """Does nothing, so that requests are not printed to the terminal."""

    return Handler


def watch(path: str | Path, port: int, say: Callable[[str], None]) -> None:
    """Serve the run's page until Ctrl-C.

    Args:
        say: prints a line for the user.

    Raises:
        PhinetuneError: there is no run at `path`, or the port is not available.
    """
    with make_server(path, port) as server:
        say(f"{path} live at {server.url} (this machine only, with this address only); Ctrl-C ends it")
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            say(f"Ended. `phinetune report {path}` writes the page as {Path(path) / REPORT}.")
