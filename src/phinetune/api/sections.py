"""The sections of a configuration as keyword arguments, the same for every verb.

Data may also be what a Python program holds. It gets a name, which stands in the configuration, and is held under it
while the verb works.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec, TypeVar

from phinetune.config.run import RunConfig, make_config
from phinetune.data.read.data_objects import hold, kind_of
from phinetune.data.read.held_data import hold_function, hold_rows, holding
from phinetune.errors import DataError

SectionValue = str | os.PathLike[str] | Mapping[str, Any] | None
# A file or several; a Dataset, a data frame, a list or an iterator of dicts; or the whole section.
DataValue = Any

Given = ParamSpec("Given")
Made = TypeVar("Made")


def holds_data(verb: Callable[Given, Made]) -> Callable[Given, Made]:
    """A verb in whose time data objects are held: `make_sections` gives them names."""

    @functools.wraps(verb)
    def called(*args: Given.args, **kwargs: Given.kwargs) -> Made:
        with holding():
            return verb(*args, **kwargs)

    return called


def make_sections(**sections: Any) -> RunConfig:
    """A configuration of the sections that are given.

    Raises:
        ConfigError: every unknown key and every bad value.
        DataError: a data object can't be used.
    """
    given = {key: section for key, section in sections.items() if section is not None}
    if "data" in given:
        given["data"] = data_section(given["data"])
    return make_config({key: _path(section) for key, section in given.items()})


def data_section(data: DataValue) -> Any:
    """The section `data` with names in place of objects.

    Raises:
        DataError: an object can't be used.
    """
    if not isinstance(data, Mapping) or kind_of(data):
        return {"train": sources(data, "data.train")}
    section = dict(data)
    streaming = bool(section.get("streaming"))
    for key in ("train", "eval", "test"):
        if key in section and not isinstance(section[key], float):
            section[key] = sources(section[key], f"data.{key}", streaming=streaming)
    if callable(section.get("row")):
        section["row"] = hold_function(section["row"])
    return section


def sources(given: Any, where: str, *, streaming: bool = False) -> Any:
    """What stands in a configuration for one source or for several, with names in place of objects.

    Args:
        where: what error messages call it.

    Raises:
        DataError: an object can't be used.
    """
    if given is None or isinstance(given, (str, bool, int)):
        return given
    if isinstance(given, os.PathLike):
        return os.fspath(given)
    if kind_of(given):
        return hold_rows(hold(given, where, streaming=streaming))
    if isinstance(given, (list, tuple)):
        if not given:
            raise DataError(f"{where}: the list is empty")
        return [sources(entry, where, streaming=streaming) for entry in given]
    if isinstance(given, Mapping):
        return {
            key: sources(value, where, streaming=streaming) if key == "path" else value for key, value in given.items()
        }
    return hold(given, where)  # raises: it is no data


def one_or_several(given: Any, where: str) -> list[str]:
    """The sources that were given, each by its name."""
    made = sources(given, where)
    return [made] if isinstance(made, str) else list(made or [])


def _path(section: Any) -> Any:
    return os.fspath(section) if isinstance(section, os.PathLike) else section
