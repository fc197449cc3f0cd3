"""The reference of a run's YAML file, from the sections' models."""

from __future__ import annotations

import types
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from doc_pages.filling import cell, table
from doc_pages.words import said
from phinetune.config.data import OtherSplit, WeightedFile
from phinetune.config.judge import JudgeMetric
from phinetune.config.model_keywords import INIT, NOT_USED, OF_DATA, OF_LOSS, OF_TRAINING, OTHER_NAMES, REFUSED
from phinetune.config.own_metrics import CustomMetric
from phinetune.config.row_forms import ALL_FORMS
from phinetune.config.run import SHORTHANDS, RunConfig
from phinetune.config.section import Section

# Entries of lists and other small sections, and where they stand.
ENTRIES: tuple[tuple[str, type[Section]], ...] = (
    ("data.train: {path: …}", WeightedFile),
    ("data.eval, data.test: {split: …}", OtherSplit),
    ("evaluation.metrics: {name: …}", CustomMetric),
    ("evaluation.metrics: {name: judge, url: …}", JudgeMetric),
)
SIGNS = {Ge: "≥", Gt: ">", Le: "≤", Lt: "<"}
KINDS = {str: "text", int: "integer", float: "number", bool: "true or false", type(None): "null"}


def config_keys(language: str) -> str:
    """Every key of every section: its type, its default, what it does."""
    parts = [_section(name, field, language) for name, field in RunConfig.model_fields.items()]
    return "\n\n".join(parts)


def config_entries(language: str) -> str:
    """The keys of entries that are dictionaries themselves."""
    return "\n\n".join(
        f"### `{place}`\n\n{said(first_line(kind), language)}\n\n{_keys(kind, '', language)}" for place, kind in ENTRIES
    )


def objective_keys(language: str) -> str:
    """The knobs of each objective beside `kind`."""
    from phinetune.training.objectives.registry import OBJECTIVES

    parts = []
    for kind, objective in OBJECTIVES.items():
        known = objective.Options.model_fields
        keys = _keys(objective.Options, "objective.", language) if known else said("No knobs.", language)
        parts.append(f"### `objective.kind: {kind}`\n\n{said(first_line(objective), language)}\n\n{keys}")
    return "\n\n".join(parts)


def auto_keys(language: str) -> str:
    """The keys of the two dictionaries that rules choose where they are left out."""
    from phinetune.training.auto_settings import AUTO_PEFT, AUTO_TRAINING

    names = [*(f"`peft_config.{key}`" for key in AUTO_PEFT), *(f"`training_config.{key}`" for key in AUTO_TRAINING)]
    return "\n".join(f"- {name}" for name in names)


def retired_keys(language: str) -> str:
    """Keys of older scripts in `training_config`, and what becomes of each."""
    from phinetune.training.idle_keys import IDLE_PEFT, IDLE_TRAINING
    from phinetune.training.retired_keys import ELSEWHERE, RETIRED_TRAINING, UNSLOTH_PEFT

    told = [(f"training_config.{key}", retired.note) for key, retired in RETIRED_TRAINING.items()]
    told += [(f"peft_config.{key}", retired.note) for key, retired in UNSLOTH_PEFT.items()]
    told += [(f"training_config.{key}", note) for key, note in OF_LOSS.items()]
    told += [(f"training_config.{INIT}", "its keys are taken as keys of `model`")]
    told += [(f"training_config.{key}", f"refused: {note}") for key, note in ELSEWHERE.items()]
    told += [(f"training_config.{key}", note) for key, note in IDLE_TRAINING.items()]
    told += [(f"peft_config.{key}", note) for key, note in IDLE_PEFT.items()]
    return _told(told, language)


# Keywords whose value decides, so that a function translates them.
BY_VALUE = (
    ("load_in_4bit", "taken as `model.quantization: nf4`"),
    ("load_in_8bit", "taken as `model.quantization: int8`"),
    (
        "quantization_config",
        "taken as `model.quantization`: the object, or a dictionary; what differs from NF4 gets a line",
    ),
    ("device_map", "taken as `model.device` where it names one device; `auto` has no effect"),
    ("use_flash_attention_2", "taken as `model.attn_implementation`"),
    ("token", "refused: set the environment variable HF_TOKEN"),
)


def model_keywords(language: str) -> str:
    """Keywords of `from_pretrained` in the section `model`, and what becomes of each."""
    told = [(f"model.{key}", f"taken as `model.{now}`") for key, now in OTHER_NAMES.items()]
    told += [(f"model.{key}", what) for key, what in BY_VALUE]
    told += [(f"model.{key}", f"taken as `training_config.{now}`") for key, now in OF_TRAINING.items()]
    told += [(f"training_config.{key}", f"taken as `data.{now}`") for key, now in OF_DATA.items()]
    told += [(f"model.{key}", f"no effect: {why}") for key, why in NOT_USED.items()]
    told += [(f"model.{key}", f"refused: {instead}") for key, (_, instead) in REFUSED.items()]
    return _told(told, language)


def row_forms(language: str) -> str:
    """The values of `data.format`, and the keys by which a row is known to have the form."""
    head = [said(word, language) for word in ("`data.format`", "keys of a row", "also read")]
    rows = []
    for form in ALL_FORMS:
        groups = said(" or ", language).join("`" + "`, `".join(group) + "`" for group in form.keys)
        rows.append([f"`{form.name}`", groups, ", ".join(f"`{key}`" for key in form.more)])
    return table(head, rows)


def _told(told: list[tuple[str, str]], language: str) -> str:
    head = [said("key", language), said("what becomes of it", language)]
    return table(head, [[f"`{key}`", cell(said(what, language))] for key, what in told])


def _section(name: str, field: FieldInfo, language: str) -> str:
    kind, told = field.annotation, said(field.description or "", language)
    if not (isinstance(kind, type) and issubclass(kind, Section)):
        return f"## `{name}`\n\n{told[:1].upper()}{told[1:]}."
    words = said(first_line(kind), language)
    if name in SHORTHANDS:
        short = said("A text in place of the section is its key `{key}`.", language)
        words += " " + short.replace("{key}", f"{name}.{SHORTHANDS[name]}")
    return f"## `{name}`\n\n{words}\n\n{_keys(kind, f'{name}.', language)}"


def first_line(kind: type) -> str:
    """The first sentence of a class's docstring."""
    return (kind.__doc__ or "").strip().splitlines()[0]


def _keys(kind: type[Section], prefix: str, language: str) -> str:
    head = [said(word, language) for word in ("key", "type", "default", "what it does")]
    rows = [
        [f"`{prefix}{key}`", _type(field, language), _default(field, language), cell(said(told(field), language))]
        for key, field in kind.model_fields.items()
    ]
    return table(head, rows)


def told(field: FieldInfo) -> str:
    """What a key does. A key without a description is a mistake of the model's."""
    if not field.description:
        raise ValueError(f"a key of the configuration has no description: {field!r}")
    return field.description


def _default(field: FieldInfo, language: str) -> str:
    if field.default_factory is not None:
        return f"`{field.default_factory()}`"  # type: ignore[call-arg]
    if field.default is PydanticUndefined:
        return said("must be given", language)
    value = field.default
    if value is None:
        return "–"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`[{', '.join(map(str, value))}]`" if isinstance(value, list) else f"`{value}`"


def _type(field: FieldInfo, language: str) -> str:
    names = list(dict.fromkeys(_names(field.annotation, field.metadata, language)))
    return cell(said(" or ", language).join(names))


def _names(annotation: Any, limits: list[Any], language: str) -> Iterator[str]:
    origin = get_origin(annotation)
    if origin is Annotated:
        inner, *more = get_args(annotation)
        yield from _names(inner, [*limits, *more], language)
    elif origin in (Union, types.UnionType):
        for one in get_args(annotation):
            if one is not type(None):
                yield from _names(one, limits, language)
    elif origin is Literal:
        yield ", ".join(f"`{value}`" for value in get_args(annotation))
    elif origin is list:
        inner = "/".join(_names(get_args(annotation)[0], [], language))
        yield said("list of {kind}", language).replace("{kind}", inner)
    elif origin is dict or (isinstance(annotation, type) and issubclass(annotation, Section)):
        yield said("dictionary", language)
    elif annotation in KINDS:
        bounds = [f"{SIGNS[type(limit)]} {_bound(limit):g}" for limit in limits if type(limit) in SIGNS]
        yield " ".join([said(KINDS[annotation], language), *([", ".join(bounds)] if bounds else [])])
    else:
        yield said("function (in Python)", language)


def _bound(limit: Any) -> float:
    return float(next(getattr(limit, name) for name in ("ge", "gt", "le", "lt") if hasattr(limit, name)))
