"""What the keys `push_to_hub` and `hub_…` of a script ask for: one push at the run's end, by phinetune's own rules."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from phinetune.config.run import DEFAULT_FOLDER


@dataclass(frozen=True)
class HubWish:
    """A push that a run's settings ask for.

    Attributes:
        repo: `name` or `owner/name`.
        private: whether the repository is private; only `hub_private_repo: false` makes a public one.
        token: the access token of the script; None takes the user's own. It is never written anywhere.
    """

    repo: str
    private: bool = True
    token: str | None = field(default=None, repr=False)


def take_wish(training: dict[str, Any], problems: list[str], notes: list[str]) -> HubWish | None:
    """Take the keys of the hub out of `training`, so that transformers' trainer pushes nothing by itself.

    Returns:
        the push that they ask for; None if they ask for none.
    """
    given = {key: training.pop(key) for key in list(training) if key.startswith(("hub_", "push_to_hub"))}
    if not given.get("push_to_hub"):
        return None
    repo = str(given.get("hub_model_id") or Path(training.get("output_dir") or DEFAULT_FOLDER).expanduser().name)
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        problems.append(f"training_config.hub_model_id: {error}")
    if given.get("hub_revision") not in (None, "main"):
        problems.append(
            f"training_config.hub_revision: a run is pushed to the branch main, not to {given['hub_revision']}; leave "
            "the key out"
        )
    private = given.get("hub_private_repo") is not False
    kind = "private" if private else "public"
    notes.append(
        f"training_config: `push_to_hub`: the finished run goes to the {kind} repository {repo} once, at the end: "
        "adapter, tokenizer, settings and card, as with `phinetune push`"
    )
    if given.get("hub_strategy", "end") != "end" or given.get("hub_always_push"):
        notes.append("training_config: `hub_strategy` and `hub_always_push` are not used; checkpoints stay here")
    return HubWish(repo, private, given.get("hub_token"))
