"""The sections of a configuration as keyword arguments, the same for every verb."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from phinetune.config.run import RunConfig, make_config

SectionValue = str | Mapping[str, Any] | None
DataValue = str | Sequence[Any] | Mapping[str, Any] | None  # a file, several, or the whole section


def make_sections(**sections: Any) -> RunConfig:
    """A configuration of the sections that are given.

    Raises:
        ConfigError: every unknown key and every bad value.
    """
    return make_config({key: section for key, section in sections.items() if section is not None})
