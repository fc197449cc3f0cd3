"""`phinetune push RUN REPO`: a run on the hub, through huggingface_hub, in one commit."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from dotenv import dotenv_values
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelInfo, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id

from phinetune.checkpoints.adapters import ADAPTER_CONFIG
from phinetune.errors import ModelError
from phinetune.export.hub.published import Shared, check_holds_no, read_shared, write_adapter, write_merged
from phinetune.export.merge.merged import MERGED_FILE
from phinetune.export.output_paths import readable_size
from phinetune.logs import quiet_libraries

TOKEN = "HF_TOKEN"


@dataclass(frozen=True)
class Push:
    """A finished push.

    Attributes:
        repo: the repository's full name.
        url: where it is seen.
        files: what it holds of this run.
        size: bytes of these.
        merged: whether the merged model was pushed, or the adapter alone.
        notes: what the user should know about it.
    """

    repo: str
    url: str
    files: Sequence[str]
    size: int
    merged: bool
    notes: Sequence[str] = ()

    def report(self, program: str = "phinetune") -> list[str]:
        """What to tell the user; `program` is how phinetune is called."""
        what = "the merged model" if self.merged else "the adapter"
        name = self.repo.rsplit("/", 1)[-1]
        fetch = [] if self.merged else [f"  hf download {self.repo} --local-dir {name}"]
        return [
            f"Pushed {what} to {self.url}: {len(self.files)} files, {readable_size(self.size)}, with a model card",
            *[f"Note: {note}" for note in self.notes],
            "Use it with:",
            *fetch,
            f"  {program} chat {self.repo if self.merged else name}",
        ]


def push_run(run: str | Path, repo: str, *, private: bool = False, merged: bool = False) -> Push:
    """Push a run, one of its checkpoints or an adapter folder to a repository on the hub, made where there is none.

    The token is `HF_TOKEN`'s, that of a `.env` file in the working folder, or that of huggingface_hub's login;
    `HF_ENDPOINT` names another hub.

    Args:
        repo: `name` or `owner/name`.
        private: make it private; one that is there and public is refused.
        merged: push base and adapter as one model.

    Raises:
        ModelError: no adapter there, no token, or what the hub refuses.
    """
    quiet_libraries()
    shared = read_shared(_checked_source(run))
    _check_name(repo)
    token = _token()
    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None, token=token, library_name="phinetune")
    with _hubs_refusals(api.endpoint, repo), tempfile.TemporaryDirectory() as place:
        owner = api.whoami()["name"]  # asked in any case, before anything is merged: a bad token ends here
        repo = repo if "/" in repo else f"{owner}/{repo}"
        _look_at_repo(api, repo, private, merged)
        folder = Path(place) / "shared"
        folder.mkdir()
        (write_merged if merged else write_adapter)(shared, folder, repo)
        check_holds_no(token, folder)
        files = sorted(folder.iterdir())
        url = _commit(api, repo, private, files)
        return Push(
            repo, url, [f.name for f in files], sum(f.stat().st_size for f in files), merged, _notes(shared, merged)
        )


def _checked_source(run: str | Path) -> Path:
    source = Path(run).expanduser()
    if (source / MERGED_FILE).is_file():
        raise ModelError(f"{source}: a merged model; push the run that it was made of, with --merged")
    if not source.is_dir():
        raise ModelError(f"{source}: no such folder; give a run, one of its checkpoints or an adapter folder")
    if not (source / ADAPTER_CONFIG).is_file():
        raise ModelError(f"{source}: no adapter there ({ADAPTER_CONFIG}); give a finished run or a checkpoint")
    return source


def _check_name(repo: str) -> None:
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ModelError(f"REPO: {error}") from None


def _token() -> str:
    """As the guide's scripts find it: the environment, else a `.env` file; else huggingface_hub's own login."""
    token = os.environ.get(TOKEN) or dotenv_values(".env", interpolate=False).get(TOKEN) or get_token()
    if not token:
        raise ModelError(
            f"no access token: set {TOKEN}, write {TOKEN}=hf_… into .env, or run `hf auth login`; a token that may "
            "write is made at https://huggingface.co/settings/tokens"
        )
    return token


def _look_at_repo(api: HfApi, repo: str, private: bool, merged: bool) -> None:
    """See what the repository holds, if it is there.

    Raises:
        ModelError: it is public, or holds an adapter or a model that would be mixed with this one.
    """
    if not api.repo_exists(repo):
        return
    info = api.model_info(repo)
    if private and not info.private:
        raise ModelError(f"{repo}: is there and public; make it private on the hub, or leave --private out")
    names = _names(info)
    if merged and ADAPTER_CONFIG in names:
        raise ModelError(f"{repo}: holds an adapter, which would be loaded on top of the merged model; name another")
    if not merged and "config.json" in names:
        raise ModelError(f"{repo}: holds a model, and transformers would take it for the adapter's base; name another")


def _names(info: ModelInfo) -> list[str]:
    return [file.rfilename for file in info.siblings or []]


def _commit(api: HfApi, repo: str, private: bool, files: Sequence[Path]) -> str:
    """All files in one commit, so that others see the whole or nothing; weights of an earlier push go with it."""
    api.create_repo(repo, private=private or None, exist_ok=True)
    new = {file.name for file in files}
    old = [name for name in _names(api.model_info(repo)) if name.endswith((".safetensors", ".safetensors.index.json"))]
    operations: list[CommitOperationAdd | CommitOperationDelete] = [
        CommitOperationDelete(name) for name in old if name not in new
    ]
    operations += [CommitOperationAdd(file.name, file) for file in files]
    api.create_commit(repo, operations, commit_message="Push with phinetune")
    return f"{api.endpoint}/{repo}"


def _notes(shared: Shared, merged: bool) -> list[str]:
    if merged or shared.base_id:
        return []
    return [f"the base `{shared.base.path}` is not on the hub, so others must have it; --merged pushes it along"]


@contextmanager
def _hubs_refusals(endpoint: str, repo: str) -> Iterator[None]:
    """What the hub or the network refuses, as a sentence."""
    try:
        yield
    except OfflineModeIsEnabled:
        raise ModelError("HF_HUB_OFFLINE is set, so nothing can be pushed; unset it") from None
    except HfHubHTTPError as error:
        raise ModelError(_sentence(error, endpoint, repo)) from error
    except (HTTPError, ConnectionError) as error:
        raise ModelError(
            f"{endpoint} could not be reached ({_first_line(error)}); check the network and HF_ENDPOINT"
        ) from error


def _sentence(error: HfHubHTTPError, endpoint: str, repo: str) -> str:
    status = error.response.status_code
    said = error.server_message or _first_line(error)
    if status == 401:
        return f"{endpoint} does not know your access token (401); check {TOKEN}, or run `hf auth login`"
    if status == 403:
        return f"{repo}: your access token may not write there (403: {said}); check REPO's owner and the token's rights"
    if status == 404:
        return f"{repo}: no such repository or owner (404: {said}); check REPO"
    return f"{repo}: {endpoint} refused it ({status}: {said}); nothing was pushed"


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].strip() if lines else type(error).__name__
