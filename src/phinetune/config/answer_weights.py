"""How the base of a model that only answers may lie in memory."""

from __future__ import annotations

from phinetune.errors import ConfigError

AUTO, Q8 = "auto", "q8_0"
KINDS = (AUTO, Q8)  # `auto` changes no number; `q8_0` rounds the weights of linear layers to eight bits


def check_kind(weights: str) -> None:
    """Make sure that there is such a kind.

    Raises:
        ConfigError: there is none.
    """
    if weights not in KINDS:
        raise ConfigError([f"weights: {weights!r} is none of {', '.join(KINDS)}"])
