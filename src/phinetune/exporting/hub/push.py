"""`phinetune push RUN REPO`: push a run to the hub with huggingface_hub, in one commit."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from dotenv import dotenv_values
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelInfo, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id

from phinetune.checkpoints.adapter_fit import ADAPTER_CONFIG
from phinetune.errors import ModelError
from phinetune.exporting.hub.published import Published, check_holds_no, read_published, write_adapter, write_merged
from phinetune.exporting.merge.merged import MERGED_FILE
from phinetune.exporting.output_paths import readable_size
from phinetune.logs import quiet_libraries

TOKEN = "HF_TOKEN"
OFFLINE = "HF_HUB_OFFLINE is set, so nothing can be pushed; unset it"


@dataclass(frozen=True)
class Push:
    """A finished push.

    Attributes:
        repo: the repository's full name.
        url: the address of its page.
        files: the names of the pushed files.
        size: bytes of these files.
        merged: whether the merged model was pushed, not only the adapter.
        private: whether the repository is private.
        notes: what the user should know about it.
    """

    repo: str
    url: str
    files: Sequence[str]
    size: int
    merged: bool
    private: bool
    notes: Sequence[str] = ()

    def report(self, program: str = "phinetune") -> list[str]:
        """What to tell the user; `program` is how phinetune is called."""
        what = "the merged model" if self.merged else "the adapter"
        name = self.repo.rsplit("/", 1)[-1]
        seen = "private" if self.private else "public"
        count = f"{len(self.files)} files, {readable_size(self.size)}"
        fetch = [] if self.merged else [f"  hf download {self.repo} --local-dir {name}"]
        return [
            f"Pushed {what} to {self.url}: {count}, with a model card; {seen}",
            *[f"Note: {note}" for note in self.notes],
            "Use it with:",
            *fetch,
            f"  {program} chat {self.repo if self.merged else name}",
        ]


def push(run: str | Path, repo: str, *, private: bool = True, merged: bool = False, token: str | None = None) -> Push:
    """Push a run, one of its checkpoints or an adapter folder to a repository on the hub.

    The repository is created if it does not exist, and it is private unless the caller says otherwise. The access
    token comes from `HF_TOKEN`, from a `.env` file in the working folder, or from huggingface_hub's login.
    `HF_ENDPOINT` names another hub.

    Args:
        repo: `name` or `owner/name`.
        private: make the repository private; one that exists and is public is refused.
        merged: push base and adapter as one model.
        token: an access token in place of the user's own.

    Raises:
        ModelError: there is no adapter or no token, or the hub refuses the push.
    """
    quiet_libraries()
    published = read_published(_checked_source(run))
    _check_name(repo)
    token = token or _token()
    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None, token=token, library_name="phinetune")
    with _explained(api.endpoint, repo), tempfile.TemporaryDirectory() as place:
        owner = api.whoami()["name"]  # always asked, so that a wrong token is refused before the merge
        repo = repo if "/" in repo else f"{owner}/{repo}"
        was_private = _check_repo(api, repo, private, merged)
        folder = Path(place) / "published"
        folder.mkdir()
        (write_merged if merged else write_adapter)(published, folder, repo)
        check_holds_no(token, folder)
        files = sorted(folder.iterdir())
        url = _commit(api, repo, private, files)
        size = sum(file.stat().st_size for file in files)
        notes = _notes(published, merged, was_private and not private)
        return Push(repo, url, [file.name for file in files], size, merged, private or was_private, notes)


def _checked_source(run: str | Path) -> Path:
    source = Path(run).expanduser()
    if (source / MERGED_FILE).is_file():
        raise ModelError(f"{source}: a merged model; push the run that it was made from, with --merged")
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
    """The access token: from the environment, else from a `.env` file, else from huggingface_hub's own login.

    Microsoft's guide uses the first two.
    """
    token = os.environ.get(TOKEN) or dotenv_values(".env", interpolate=False).get(TOKEN) or get_token()
    if not token:
        raise ModelError(
            f"no access token: set {TOKEN}, write {TOKEN}=hf_… into .env, or run `hf auth login`; create a token with "
            "write permission at https://huggingface.co/settings/tokens"
        )
    return token


def check_can_push(token: str | None = None) -> None:
    """Make sure, without asking the hub, that something can be pushed later.

    Args:
        token: an access token in place of the user's own.

    Raises:
        ModelError: there is no token, or huggingface_hub is told to stay offline.
    """
    if constants.HF_HUB_OFFLINE:
        raise ModelError(OFFLINE)
    if not token:
        _token()


def _check_repo(api: HfApi, repo: str, private: bool, merged: bool) -> bool:
    """Make sure that the repository, if it exists, may take this push.

    Returns:
        whether it exists and is private.

    Raises:
        ModelError: it is public, or its adapter or model would be mixed with the pushed one.
    """
    if not api.repo_exists(repo):
        return False
    info = api.model_info(repo)
    if private and not info.private:
        raise ModelError(
            f"{repo}: exists and is public, so everyone would see what is pushed; make it private on the hub, name "
            "another one, or say --public"
        )
    names = _names(info)
    if merged and ADAPTER_CONFIG in names:
        raise ModelError(
            f"{repo}: holds an adapter, which would be loaded on top of the merged model; name another one"
        )
    if not merged and "config.json" in names:
        raise ModelError(
            f"{repo}: holds a model, and transformers would take it for the adapter's base; name another one"
        )
    return bool(info.private)


def _names(info: ModelInfo) -> list[str]:
    return [file.rfilename for file in info.siblings or []]


def _commit(api: HfApi, repo: str, private: bool, files: Sequence[Path]) -> str:
    """Push all files in one commit, so that others see all or nothing. Old weight files are deleted in the same commit.

    Returns the address of the repository.
    """
    api.create_repo(repo, private=private, exist_ok=True)
    new = {file.name for file in files}
    old = [name for name in _names(api.model_info(repo)) if name.endswith((".safetensors", ".safetensors.index.json"))]
    operations: list[CommitOperationAdd | CommitOperationDelete] = [
        CommitOperationDelete(name) for name in old if name not in new
    ]
    operations += [CommitOperationAdd(file.name, file) for file in files]
    api.create_commit(repo, operations, commit_message="Push with phinetune")
    return f"{api.endpoint}/{repo}"


def _notes(published: Published, merged: bool, stays_private: bool) -> list[str]:
    notes = []
    if not (merged or published.base_id):
        notes.append(
            f"the base `{published.base.path}` is not on the hub, so others need a copy of it; --merged pushes base "
            "and adapter as one model"
        )
    if stays_private:
        notes.append("the repository was there as a private one, and it stays private")
    return notes


@contextmanager
def _explained(endpoint: str, repo: str) -> Iterator[None]:
    """Turn the errors of the hub and of the network into sentences for the user."""
    try:
        yield
    except OfflineModeIsEnabled:
        raise ModelError(OFFLINE) from None
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
