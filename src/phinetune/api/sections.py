"""The sections of a configuration as keyword arguments, the same for every verb.

Data may also be what a Python program holds. It gets a name, which stands in the configuration, and is held under it
while the verb works.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec, TypeVar

from phinetune.config.run import RunConfig, make_config
from phinetune.config.section import Section
from phinetune.data.read.data_objects import hold, kind_of
from phinetune.data.read.held_data import hold_function, hold_rows, holding
from phinetune.errors import ConfigError, DataError

SectionValue = str | os.PathLike[str] | Mapping[str, Any] | None
# A file or several; a Dataset, a data frame, a list or an iterator of dicts; or the whole section.
DataValue = Any

# Arguments of TRL's and transformers' trainers, and what stands in their place.
OF_TRAINERS: Mapping[str, str] = {
    "args": "its arguments are the dictionary training_config",
    "train_dataset": "it is `data`, or data['train'] beside other keys",
    "eval_dataset": "it is data['eval']",
    "processing_class": "the tokenizer is the checkpoint's; model['tokenizer'] names another",
    "tokenizer": "the tokenizer is the checkpoint's; model['tokenizer'] names another",
    "formatting_func": "data['row'] is such a function: it is given a row, and returns a text or messages",
    "data_collator": "data['loss_on'] and data['response'] say what is trained on",
    "compute_metrics": "evaluation['metrics'] takes a function of answers and references (docs/metrics.md)",
    "preprocess_logits_for_metrics": "no logits are kept; evaluation['metrics'] takes functions of answers",
    "callbacks": "`train` takes them, for one run",
    "optimizers": "training_config.optim and lr_scheduler_type name them",
    "optimizer_cls_and_kwargs": "training_config.optim and optim_args name it",
    "compute_loss_func": "`objective` says what a run trains for",
    "quantization_config": "it is model['quantization_config']",
    "ref_model": "the reference is the model as it stands when the run starts",
}

Given = ParamSpec("Given")
Made = TypeVar("Made")


def holds_data(verb: Callable[Given, Made]) -> Callable[Given, Made]:
    """A verb in whose time data objects are held: `make_sections` gives them names."""

    @functools.wraps(verb)
    def called(*args: Given.args, **kwargs: Given.kwargs) -> Made:
        _refuse_trainers(verb, kwargs)
        with holding():
            return verb(*args, **kwargs)

    return called


def _refuse_trainers(verb: Callable[..., Any], given: Mapping[str, Any]) -> None:
    """Refuse the arguments of other libraries' trainers, each with what stands in its place.

    Raises:
        ConfigError: there are some.
    """
    own = inspect.signature(verb).parameters
    found = [key for key in given if key in OF_TRAINERS and key not in own]
    if found:
        raise ConfigError([f"{verb.__name__}: it takes no `{key}`: {OF_TRAINERS[key]}" for key in found])


def make_sections(**sections: Any) -> RunConfig:
    """A configuration of the sections that are given.

    Raises:
        ConfigError: every unknown key and every bad value.
        DataError: a data object can't be used.
    """
    given = {key: section for key, section in sections.items() if section is not None}
    if "data" in given:
        given["data"] = data_section(given["data"])
    return make_config({key: _plain(key, section) for key, section in given.items()})


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


def _plain(key: str, section: Any) -> Any:
    """A section as a text or a dictionary.

    Raises:
        ConfigError: it is an object of another library, such as a model or a `LoraConfig`.
    """
    if isinstance(section, os.PathLike):
        return os.fspath(section)
    if isinstance(section, (str, Mapping, Section)):
        return section
    kind = type(section).__name__
    if key in ("peft_config", "training_config"):
        raise ConfigError(f"{key}: it should be a dictionary, not a {kind}; write dict(…) in place of {kind}(…)")
    raise ConfigError(f"{key}: it should be a text or a dictionary, not a {kind}; objects in memory are not taken here")
