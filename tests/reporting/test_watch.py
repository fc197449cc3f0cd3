"""The server of a live page."""

from __future__ import annotations

import http.client
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from subprocess import PIPE
from urllib.parse import urlsplit

import pytest

from phinetune.errors import PhinetuneError
from phinetune.reporting.watch import make_server
from reporting.report_helpers import make_run


@contextmanager
def served(folder: Path) -> Iterator[str]:
    with make_server(folder, 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.url
        server.shutdown()


def get(url: str, path: str | None = None, host: str = "127.0.0.1") -> tuple[int, str]:
    address = urlsplit(url)
    assert address.port
    connection = http.client.HTTPConnection("127.0.0.1", address.port, timeout=10)
    connection.request("GET", path or address.path, headers={"Host": f"{host}:{address.port}"})
    answer = connection.getresponse()
    return answer.status, answer.read().decode()


def test_the_page_follows_the_run(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", steps=4, finished=False)
    with served(folder) as url:
        assert "stopped at step 4 of 30" in get(url)[1]
        make_run(folder, steps=9, finished=False)
        assert "stopped at step 9 of 30" in get(url)[1]


def test_only_this_machine_under_its_own_name_is_answered(tmp_path: Path) -> None:
    with served(make_run(tmp_path / "run")) as url:
        for host in ("localhost", "127.0.0.1"):
            assert get(url, host=host)[0] == 200
        for host in ("evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "", "[::1]", "0.0.0.0"):
            assert get(url, host=host)[0] == 403
        assert get(url, f"{urlsplit(url).path}results.json")[0] == 404
        assert get(url, "/../../etc/passwd")[0] == 404


def test_without_the_token_of_its_address_there_is_no_page(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    with served(folder) as url, served(folder) as other:
        token = urlsplit(url).path
        assert len(token) > 20
        for path in ("/", "/?token=", token[:-2] + "/", f"{token}x", urlsplit(other).path, "/%C3%A9/"):
            status, text = get(url, path)
            assert status == 404
            assert token.strip("/") not in text
        assert get(url, f"{token}?x")[0] == 200


def test_a_run_that_goes_away_is_told(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    with served(folder) as url:
        folder.rename(tmp_path / "moved")
        status, text = get(url)
    assert status == 503
    assert "no such folder" in text


def test_a_port_that_is_taken_is_a_sentence(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(PhinetuneError, match=f"port {port} of 127.0.0.1 is taken; name another with --port"):
            make_server(make_run(tmp_path / "run"), port)


def test_ctrl_c_ends_it_well(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    command = [sys.executable, "-m", "phinetune", "watch", str(folder), "--port", "0"]
    with subprocess.Popen(command, stdout=PIPE, stderr=PIPE, text=True, preexec_fn=_heed_ctrl_c) as process:
        try:
            assert process.stdout
            line = process.stdout.readline()
            assert get(line.partition(" live at ")[2].partition(" ")[0])[0] == 200
            process.send_signal(signal.SIGINT)
            out, errors = process.communicate(timeout=20)
        finally:
            process.kill()
    assert process.returncode == 0
    assert f"phinetune report {folder}" in out
    assert errors == ""


def _heed_ctrl_c() -> None:
    """Tests that run in a shell's background are started with Ctrl-C ignored, and would pass that on."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
