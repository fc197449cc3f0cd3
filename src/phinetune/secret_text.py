"""Keeps access tokens out of what is shown and written: logs, configurations, cards, pages, errors."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

HIDDEN = "(secret)"
# Tokens that are known by their form: of Hugging Face, OpenAI and Anthropic, GitHub, AWS, Google, Slack, Weights &
# Biases; and a password in an address.
FORMS = (
    r"\b(?:hf|api_org)_[A-Za-z0-9]{20,}",
    r"\bsk-[A-Za-z0-9_-]{20,}",
    r"\b(?:gh[pousr]_[A-Za-z0-9]{30,}|github_pat_[A-Za-z0-9_]{30,})",
    r"\bAKIA[0-9A-Z]{16}\b",
    r"\bAIza[0-9A-Za-z_-]{35}",
    r"\bxox[abprs]-[A-Za-z0-9-]{10,}",
    r"\bwandb_v1_[A-Za-z0-9_]{20,}",
    r"(?<=://)[^\s/:@]*:[^\s/@]+(?=@)",
)
_FORMS = re.compile("|".join(FORMS))
# Names of variables and keys whose value is a secret, whatever its form.
_NAMES = re.compile(r"(?:^|_)(?:token|api_?key|secret|secret_?key|password|passwd|access_?key)$", re.IGNORECASE)
_NO_SECRETS = frozenset({"pad_token", "eos_token", "bos_token", "unk_token", "mask_token", "sep_token", "cls_token"})
SHORTEST = 8  # letters of a variable's value; a shorter one is a word that stands in many texts


def without_secrets(text: str) -> str:
    """The text without access tokens: those of this process's environment, and those that are known by their form."""
    for name, value in os.environ.items():
        if len(value) >= SHORTEST and is_secret_name(name):
            text = text.replace(value, HIDDEN)
    return _FORMS.sub(HIDDEN, text)


def is_secret_name(name: str) -> bool:
    """Whether a key or a variable of this name holds a secret."""
    return bool(_NAMES.search(name)) and name.lower() not in _NO_SECRETS


def tree_without_secrets(tree: Any) -> Any:
    """A tree of JSON with `HIDDEN` in place of each secret, and of each text that stands under the name of one."""
    if isinstance(tree, str):
        return without_secrets(tree)
    if isinstance(tree, Mapping):
        return {key: HIDDEN if _holds(key, value) else tree_without_secrets(value) for key, value in tree.items()}
    return [tree_without_secrets(one) for one in tree] if isinstance(tree, list) else tree


def _holds(key: Any, value: Any) -> bool:
    return isinstance(value, str) and bool(value) and is_secret_name(str(key))
