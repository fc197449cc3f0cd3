"""The configuration of a whole run. It is read from YAML or from dictionaries, and overrides replace single values.

`peft_config` and `training_config` are dictionaries here. Their keys are those of `peft.LoraConfig` and
`trl.SFTConfig`; `phinetune.training.settings` validates them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import Field, ValidationError, model_validator

from phinetune.config.data import DataSection
from phinetune.config.engine import EngineSection
from phinetune.config.evaluation import EvaluationSection
from phinetune.config.model import ModelSection
from phinetune.config.model_keywords import (
    INIT,
    OF_DATA,
    OF_LOSS,
    OF_TRAINING,
    move_losses,
    move_to_data,
    move_to_model,
    move_to_training,
)
from phinetune.config.objective import ObjectiveSection
from phinetune.config.section import Section, joined_message
from phinetune.config.yaml_text import read_yaml
from phinetune.errors import ConfigError, unknown_key
from phinetune.secret_text import tree_without_secrets

# If a section is given as text, the text is the value of this one key of the section.
SHORTHANDS = {"model": "path", "data": "train", "objective": "kind", "engine": "kind"}
DEFAULT_FOLDER = "runs/phinetune"  # where a run is written that names no folder


# Keys of training_config that are never written down.
SECRETS = ("hub_token", "push_to_hub_token")


class RunConfig(Section):
    """The configuration of a whole run. `RunConfig.model_validate` and `load_config` make one."""

    model: ModelSection = Field(default_factory=ModelSection, description="the checkpoint")
    data: DataSection = Field(default_factory=DataSection, description="the chats")
    peft_config: dict[str, Any] = Field(
        default_factory=dict, description="keys of peft.LoraConfig; r and lora_alpha may be `auto`"
    )
    training_config: dict[str, Any] = Field(
        default_factory=dict, description="keys of trl.SFTConfig; `auto`, or none, lets rules choose (docs/choices.md)"
    )
    objective: ObjectiveSection = Field(default_factory=ObjectiveSection, description="what a run trains for")
    engine: EngineSection = Field(default_factory=EngineSection, description="how a step is computed")
    evaluation: EvaluationSection = Field(default_factory=EvaluationSection, description="base against tuned")

    @model_validator(mode="before")
    @classmethod
    def _shorthands(cls, value: Any) -> Any:
        """Accept `model: PATH`, `data: FILE`, `objective: KIND` and `engine: KIND`, and leave out empty sections."""
        if not isinstance(value, Mapping):
            return value
        value = {key: section for key, section in value.items() if section is not None}
        for section, key in SHORTHANDS.items():
            if isinstance(value.get(section), (str, Path, list)):
                short = value[section]
                value[section] = {key: short if isinstance(short, list) else str(short)}
        return _moved(value)

    @model_validator(mode="after")
    def _bf16_means_the_weights(self) -> RunConfig:
        """With `bf16: true` and no dtype, load the weights in bfloat16, too. The guide's scripts do the same."""
        if self.model.dtype == "auto" and self.training_config.get("bf16"):
            self.model.dtype = "bfloat16"
        return self

    @property
    def output_dir(self) -> Path:
        """The folder of the run: `training_config.output_dir`, or `DEFAULT_FOLDER` if it is not set."""
        return Path(self.training_config.get("output_dir") or DEFAULT_FOLDER)


# Keys of scripts that stand in one section and belong into another: whence, whither, the keys, and what moves them.
MOVES = (
    ("model", "training_config", OF_TRAINING, move_to_training),
    ("training_config", "model", (INIT,), move_to_model),
    ("training_config", "data", OF_DATA, move_to_data),
    ("training_config", "data", OF_LOSS, move_losses),
)


def _moved(sections: dict[str, Any]) -> dict[str, Any]:
    """The sections, with what stands in the wrong one where it belongs."""
    for source, target, keys, move in MOVES:
        kept, moved = sections.get(source) or {}, sections.get(target) or {}
        if isinstance(kept, Mapping) and isinstance(moved, Mapping) and any(key in kept for key in keys):
            sections[source], sections[target] = move(kept, moved)
    return sections


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML file, apply overrides, and validate the result.

    Args:
        overrides: texts `section.key=value`.

    Raises:
        ConfigError: the file does not exist or is broken YAML, a key stands twice, or there are unknown keys or bad
            values; the error lists all of these.
    """
    file = Path(path)
    try:
        tree = read_yaml(file.read_text(encoding="utf-8"), str(file))
    except FileNotFoundError:
        raise ConfigError(f"{file}: no such file") from None
    except IsADirectoryError:
        raise ConfigError(f"{file} is a folder; give the YAML file of the run") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: not UTF-8 text ({error})") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise ConfigError(f"{file}{line}: broken YAML: {getattr(error, 'problem', None) or error}") from None
    if tree is not None and not isinstance(tree, dict):
        raise ConfigError(f"{file}: expected sections such as `model:` and `data:`, found {type(tree).__name__}")
    return make_config(tree or {}, overrides, where=str(file))


def make_config(tree: Mapping[str, Any], overrides: Sequence[str] = (), where: str = "configuration") -> RunConfig:
    """Apply overrides to nested dictionaries, and validate the result.

    Args:
        overrides: texts `section.key=value`.
        where: what error messages call the configuration.

    Raises:
        ConfigError: an override is malformed, or there are unknown keys or bad values; the error lists all of these.
    """
    merged: dict[str, Any] = {key: dict(v) if isinstance(v, Mapping) else v for key, v in tree.items()}
    for override in overrides:
        _apply_override(merged, override)
    try:
        return RunConfig.model_validate(merged)
    except ValidationError as error:
        raise ConfigError([_sentence(where, problems) for problems in _by_knob(error.errors())]) from None


def _apply_override(tree: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise ConfigError(f"--set {override}: write it as section.key=value, for example data.limit=100")
    for key in keys[:-1]:
        below = tree.get(key)
        if isinstance(below, str) and key in SHORTHANDS:
            below = {SHORTHANDS[key]: below}
        if below is not None and not isinstance(below, dict):
            raise ConfigError(f"--set {override}: `{key}` holds a value, not a section")
        tree[key] = tree = dict(below or {})
    try:
        tree[keys[-1]] = read_yaml(text, f"--set {override}", lines=False)
    except yaml.YAMLError:
        tree[keys[-1]] = text


def _by_knob(problems: Sequence[Any]) -> list[list[Any]]:
    """The problems of each knob. For one that takes several kinds of values, pydantic names each kind in the path."""
    knobs: dict[tuple[Any, ...], list[Any]] = {}
    for problem in problems:
        loc = problem["loc"]
        knobs.setdefault(loc[:2] if _names_a_kind(loc) else loc, []).append(problem)
    return list(knobs.values())


def _names_a_kind(loc: Sequence[Any]) -> bool:
    return len(loc) > 2 and loc[0] in RunConfig.model_fields and isinstance(loc[2], str)


def _sentence(where: str, problems: Sequence[Any]) -> str:
    """One sentence for the problems of a knob. Where an entry of a list is wrong, only that is told."""
    deepest = max(len(one["loc"]) for one in problems)
    problems = [one for one in problems if len(one["loc"]) == deepest]
    problem = problems[0]
    path = [str(part) for part in problem["loc"]]
    if problem["type"] == "extra_forbidden":
        section = _section_at(path[:-1])
        return unknown_key(": ".join([where, *path[:-1]]), path[-1], section.model_fields)
    if _names_a_kind(problem["loc"]):
        path = [*path[:2], *(str(part) for part in problem["loc"][2:] if isinstance(part, int))]
    message = joined_message([one["msg"] for one in problems])
    given = "" if problem["type"] == "value_error" else f" (given: {_shown(problem['input'])})"
    return f"{where}: {'.'.join(path)}: {message}{given}"


def _shown(value: Any) -> str:
    """A value that was given, in a line; an object that is long to print by its kind."""
    told = repr(value)
    return told if len(told) <= 200 else f"{told[:160]}…, a {type(value).__name__}"


def _section_at(path: Sequence[str]) -> type[Section]:
    section: type[Section] = RunConfig
    for part in path:
        section = next(t for t in _types(section.model_fields[part].annotation) if issubclass(t, Section))
    return section


def _types(annotation: Any) -> tuple[type, ...]:
    return tuple(t for t in (get_args(annotation) or (annotation,)) if isinstance(t, type))


def dump_config(config: RunConfig) -> str:
    """The configuration as YAML: every knob with the value that it has, but no access token."""
    tree = config.model_dump(mode="json")
    tree["training_config"] = {key: value for key, value in tree["training_config"].items() if key not in SECRETS}
    return str(yaml.safe_dump(tree_without_secrets(tree), sort_keys=False, allow_unicode=True, width=100))


def describe_config() -> list[tuple[str, str, str]]:
    """The key, the default and the description of every knob of the sections declared here, in order."""
    rows: list[tuple[str, str, str]] = []
    for name, field in RunConfig.model_fields.items():
        section = field.annotation
        if isinstance(section, type) and issubclass(section, Section):
            rows += [(f"{name}.{k}", str(f.default), f.description or "") for k, f in section.model_fields.items()]
        else:
            rows.append((name, "{}", field.description or ""))
    return rows
