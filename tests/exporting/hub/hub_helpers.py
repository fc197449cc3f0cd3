"""A hub on loopback: the few endpoints that huggingface_hub uses to push, to look at and to fetch a repository.

with serve_hub() as hub:          # the fixture `hub` does this and points huggingface_hub at it
    hub.add_folder("alice/base", folder)
    HfApi(endpoint=hub.url, token=hub.token)
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

USER = "alice"
TOKEN = "hf_of_alice"  # may write what is alice's
READ_TOKEN = "hf_of_bob"  # another user's


@dataclass
class Repo:
    """A repository: its files as they are now, and the summary of each commit."""

    private: bool = False
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[str] = field(default_factory=list)

    @property
    def sha(self) -> str:
        return hashlib.sha1("\n".join(self.commits).encode()).hexdigest()


@dataclass
class Hub:
    """What the server holds and was asked for.

    Attributes:
        url: of the server, for `HF_ENDPOINT` and `endpoint=`.
        token: of the user alice, who owns what is called `alice/…`.
        requests: `METHOD path` of every request, in order.
    """

    url: str = ""
    token: str = TOKEN
    repos: dict[str, Repo] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)

    def add_folder(self, name: str, folder: Path, private: bool = False) -> Repo:
        """A repository with the files of a folder, as if it had been pushed."""
        files = {file.name: file.read_bytes() for file in sorted(folder.iterdir()) if file.is_file()}
        self.repos[name] = Repo(private, files, ["made"])
        return self.repos[name]


class Refused(Exception):
    """An answer other than 200, with the hub's own header for errors."""

    def __init__(self, status: int, message: str, code: str = "") -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Nothing is printed."""

    def _serve(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        try:
            for method, pattern, serve in ROUTES:
                found = re.fullmatch(pattern, path)
                if found and self.command in method:
                    serve(self, body, **found.groupdict())
                    return
            raise Refused(404, f"this hub has no {self.command} {path}")
        except Refused as refused:
            headers = {"X-Error-Message": refused.message, **({"X-Error-Code": refused.code} if refused.code else {})}
            self._answer(json.dumps({"error": refused.message}).encode(), refused.status, headers)

    do_GET = do_HEAD = do_POST = do_PUT = _serve

    def _answer(self, body: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        given = {"Content-Type": "application/json", "Content-Length": str(len(body)), **(headers or {})}
        for name, value in given.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, tree: Any) -> None:
        self._answer(json.dumps(tree).encode())

    # -- who asks, and for what --------------------------------------------------------------------------------

    def _user(self) -> str | None:
        given = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if given and given not in (TOKEN, READ_TOKEN):
            raise Refused(401, "Invalid username or password.")
        return {TOKEN: USER, READ_TOKEN: "bob"}.get(given)

    def _readable(self, repo: str) -> Repo:
        user = self._user()
        found = self.hub.repos.get(repo)
        if found is None or (found.private and user != repo.split("/")[0]):
            raise Refused(404 if user else 401, "Repository not found", "RepoNotFound")
        return found

    def _writable(self, repo: str) -> Repo:
        user = self._user()
        if user != repo.split("/")[0]:
            raise Refused(403, f"You don't have the rights to write to {repo}")
        return self._readable(repo)

    # -- the endpoints -----------------------------------------------------------------------------------------

    def whoami(self, _: bytes) -> None:
        user = self._user()
        if user is None:
            raise Refused(401, "Invalid username or password.")
        self._json({"type": "user", "name": user, "orgs": []})

    def create(self, body: bytes) -> None:
        wanted = json.loads(body)
        user = self._user()
        owner = wanted.get("organization") or user
        name = f"{owner}/{wanted['name']}"
        if user is None or owner != user:
            raise Refused(403, f"You don't have the rights to create a model under the namespace {owner}")
        answer = {"url": f"{self.hub.url}/{name}", "id": name, "name": name}
        if name in self.hub.repos:  # where it is, all the same
            self._answer(json.dumps({**answer, "error": "You already created this model repo"}).encode(), 409)
            return
        private = wanted.get("visibility") == "private" or bool(wanted.get("private"))
        self.hub.repos[name] = Repo(private)
        self._json(answer)

    def info(self, _: bytes, repo: str, revision: str | None = None) -> None:
        found = self._readable(repo)
        if revision not in (None, "main", found.sha):
            raise Refused(404, "Invalid rev id", "RevisionNotFound")
        siblings = [{"rfilename": name} for name in found.files]
        self._json({"id": repo, "modelId": repo, "sha": found.sha, "private": found.private, "siblings": siblings})

    def tree(self, _: bytes, repo: str, revision: str) -> None:
        found = self._readable(repo)
        self._json(
            [
                {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for name, data in found.files.items()
            ]
        )

    def validate_yaml(self, body: bytes) -> None:
        """The hub looks at the front matter; a card without one earns a warning, as there."""
        bare = not json.loads(body)["content"].startswith("---\n")
        self._json({"errors": [], "warnings": [{"message": "empty or missing yaml metadata"}] if bare else []})

    def preupload(self, body: bytes, repo: str) -> None:
        """Weights go as large files, the rest stands in the commit."""
        self._writable(repo)
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                "shouldIgnore": False,
                "oid": None,
            }
            for file in json.loads(body)["files"]
        ]
        self._json({"files": files})

    def batch(self, body: bytes, repo: str) -> None:
        self._writable(repo)
        objects = [
            {**wanted, "actions": {"upload": {"href": f"{self.hub.url}/objects/{wanted['oid']}"}}}
            for wanted in json.loads(body)["objects"]
        ]
        self._json({"transfer": "basic", "objects": objects})

    def put_object(self, body: bytes, oid: str) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            raise Refused(400, "the object is not the one announced")
        self.hub.objects[oid] = body
        self._answer(b"")

    def commit(self, body: bytes, repo: str) -> None:
        """All or nothing."""
        found = self._writable(repo)
        files, summary = dict(found.files), ""
        for entry in map(json.loads, body.splitlines()):
            value = entry["value"]
            if entry["key"] == "header":
                summary = value["summary"]
            elif entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
            else:
                assert entry["key"] == "deletedFile"
                del files[value["path"]]
        found.files = files
        found.commits.append(summary)
        self._json({"success": True, "commitOid": found.sha, "commitUrl": f"{self.hub.url}/{repo}/commit/{found.sha}"})

    def resolve(self, _: bytes, repo: str, revision: str, name: str) -> None:
        found = self._readable(repo)
        if name not in found.files:
            raise Refused(404, "Entry not found", "EntryNotFound")
        data = found.files[name]
        etag = f'"{hashlib.sha1(data).hexdigest()}"'
        self._answer(
            data, headers={"ETag": etag, "X-Repo-Commit": found.sha, "Content-Type": "application/octet-stream"}
        )


_REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"
ROUTES: list[tuple[tuple[str, ...], str, Callable[..., None]]] = [
    (("GET",), "/api/whoami-v2", _Handler.whoami),
    (("POST",), "/api/repos/create", _Handler.create),
    (("POST",), "/api/validate-yaml", _Handler.validate_yaml),
    (("GET",), f"/api/models/{_REPO}", _Handler.info),
    (("GET",), f"/api/models/{_REPO}/revision/(?P<revision>[^/]+)", _Handler.info),
    (("GET",), f"/api/models/{_REPO}/tree/(?P<revision>[^/]+)", _Handler.tree),
    (("POST",), f"/api/models/{_REPO}/preupload/main", _Handler.preupload),
    (("POST",), f"/api/models/{_REPO}/commit/main", _Handler.commit),
    (("POST",), f"/{_REPO}.git/info/lfs/objects/batch", _Handler.batch),
    (("PUT",), r"/objects/(?P<oid>[0-9a-f]{64})", _Handler.put_object),
    (("GET", "HEAD"), f"/{_REPO}/resolve/(?P<revision>[^/]+)/(?P<name>.+)", _Handler.resolve),
]


@contextmanager
def serve_hub() -> Iterator[Hub]:
    """A hub on a free port of loopback, gone at the end."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


def point_at(hub: Hub, monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    """Let huggingface_hub in this process, and in those it starts, use `hub` as alice, with a cache of its own.

    It reads most of its environment when it is imported, hence both. Xet, its newer way to send large files, talks to
    servers of its own and is off, as `HF_HUB_DISABLE_XET` lets users have it.
    """
    from huggingface_hub import constants

    environment = {"HF_ENDPOINT": hub.url, "HF_TOKEN": hub.token, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    values = {
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "ENDPOINT": hub.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(home / "hub"),
        "HF_TOKEN_PATH": str(home / "token"),
    }
    for name, value in values.items():
        monkeypatch.setattr(constants, name, value)
