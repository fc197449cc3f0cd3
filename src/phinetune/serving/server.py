"""Runs a server: its folder is taken, its key read or made, its jobs go on, and it listens until it is stopped."""

from __future__ import annotations

import ipaddress
import logging
import os
import secrets
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout

from phinetune.errors import ConfigError, RunError
from phinetune.files import write_text
from phinetune.serving.settings import ServerSettings
from phinetune.serving.state import ServerState, open_state

if TYPE_CHECKING:
    import uvicorn

logger = logging.getLogger(__name__)

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
KEY_FILE, LOCK_FILE = "key", "server.lock"
LEAST_KEY = 16  # letters of a key that a user gives
STOP_S = 5  # that requests in flight have to end when the server stops
BACKLOG = 2048


@contextmanager
def running_state(settings: ServerSettings, key: str | None = None) -> Iterator[ServerState]:
    """A context with the state in a server's folder, whose jobs go on meanwhile. No other server has the folder.

    Args:
        key: what clients have to know; None takes the one in the folder, which is made if it is missing.

    Raises:
        PhinetuneError: another server has the folder, it can't be used, or the server may not listen there.
    """
    check_place(settings, key)
    settings.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    lock = FileLock(settings.folder / LOCK_FILE)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise RunError(
            f"{settings.folder}: another server has this folder; stop it, or name another (--folder)"
        ) from None
    from phinetune.serving.files import sweep
    from phinetune.serving.held_adapters import sweep_held
    from phinetune.serving.keeper import JobKeeper
    from phinetune.serving.page.exports import ExportKeeper

    state = open_state(settings, key or own_key(settings.folder))
    try:
        sweep(state)
        sweep_held(state)
        keeper = JobKeeper(state, state.workshop)
        state.wake_jobs = keeper.wake
        state.closing.append(keeper.close)
        keeper.start()
        exports = ExportKeeper(state)
        state.closing.append(exports.close)
        exports.start()
        yield state
    finally:
        for close in reversed(state.closing):
            with suppress(Exception):
                close()
        state.store.close()
        lock.release()


def run_server(
    settings: ServerSettings,
    key: str | None = None,
    on_ready: Callable[[ServerState, str], None] = lambda state, url: None,
) -> None:
    """Listen until SIGINT or SIGTERM. Jobs that train then go on, and the next server finds them.

    Args:
        on_ready: is called with the state and the server's URL when clients can connect.

    Raises:
        PhinetuneError: see `running_state`; or the port is taken.
    """
    import uvicorn

    from phinetune.serving.app import create_app

    with running_state(settings, key) as state, _listening(settings) as listener:
        config = uvicorn.Config(
            create_app(state),
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=STOP_S,
            timeout_keep_alive=30,
            lifespan="off",
            ws="none",
        )
        on_ready(state, address(settings, listener))
        _server(config, state).run([listener])


def _server(config: uvicorn.Config, state: ServerState) -> uvicorn.Server:
    """A server that ends on a signal, so that what is around it ends too; uvicorn's own kills itself."""
    import uvicorn

    class Server(uvicorn.Server):
        @contextmanager
        def capture_signals(self) -> Iterator[None]:
            before = {number: signal.signal(number, self.handle_exit) for number in STOP_SIGNALS}
            try:
                yield
            finally:
                for number, handler in before.items():
                    signal.signal(number, handler)

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            await super().shutdown(sockets)
            state.workshop.close()  # whoever still waits for a look at a file would keep the process

    return Server(config)


def check_place(settings: ServerSettings, key: str | None) -> None:
    """Make sure that a server may listen where it is to listen.

    Raises:
        ConfigError: others could reach it, and no key was given; or the key is too short.
    """
    if key is not None and (len(key) < LEAST_KEY or not key.isprintable() or " " in key or not key.isascii()):
        raise ConfigError(f"--key: a key has at least {LEAST_KEY} letters and digits, without spaces")
    if not is_loopback(settings.host) and key is None:
        raise ConfigError(
            f"--host {settings.host}: others could reach this server, so give it a key of your own (--key-file FILE, "
            "or PHINETUNE_SERVE_KEY); and put a proxy with TLS in front, since key and chats would cross the network "
            "in the clear"
        )


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def own_key(folder: Path) -> str:
    """The key in a server's folder, for the user alone. It is made at the first start."""
    place = folder / KEY_FILE
    with suppress(FileNotFoundError):
        key = place.read_text(encoding="utf-8").strip()
        if len(key) >= LEAST_KEY:
            os.chmod(place, 0o600)
            return key
    key = f"sk-phinetune-{secrets.token_urlsafe(32)}"
    write_text(place, key + "\n", private=True)
    return key


@contextmanager
def _listening(settings: ServerSettings) -> Iterator[socket.socket]:
    """A context with a socket that listens.

    Its connections send what is small at once. Else the body of an answer waits for the client's receipt of the head,
    which systems hold back for some 40 ms. asyncio asks for it where a socket's protocol is named, and this one's is 0.

    Raises:
        RunError: the port is taken, or the address is none of this machine.
    """
    try:
        found = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        listener = socket.create_server(found[0][4][:2], family=found[0][0], backlog=BACKLOG)
    except (OSError, OverflowError) as error:
        raise RunError(
            f"{settings.host}:{settings.port} can't be listened on ({error}); name another with --port, or --port 0 "
            "for any that is free"
        ) from None
    with listener:
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        yield listener


def address(settings: ServerSettings, listener: socket.socket) -> str:
    """The URL at which this machine's clients reach the server."""
    port = listener.getsockname()[1]
    host = settings.host
    if host in ("0.0.0.0", "::", ""):
        host = "127.0.0.1"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
