"""The configuration of a run: six sections, each knob declared once with its default and its help.

`peft_config` and `training_config` are plain dictionaries here: their keys are those of
`peft.LoraConfig` and `trl.SFTConfig`, and `phinetune.training.settings` validates them.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from phinetune.errors import ConfigError, unknown_key

logger = logging.getLogger(__name__)


class Section(BaseModel):
    """A group of knobs; unknown keys are refused with the nearest known one."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True)


class ModelSection(Section):
    """Which checkpoint, and how it is held in memory."""

    path: str = Field("starter", description="hub id, folder, `starter`, or `random:SHAPE` for random weights")
    revision: str | None = Field(None, description="branch, tag or commit of a hub id; resolved to a commit")
    tokenizer: str | None = Field(None, description="another folder or hub id to take the tokenizer from")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="weights' dtype; auto: bfloat16 where training_config.bf16 is set or the device multiplies it no "
        "more slowly than float32, else float32",
    )
    quantization: Literal["none", "nf4", "int8"] = Field(
        "none",
        description="hold the decoder's linear layers in 4 bits (nf4: QLoRA, double quantisation) or 8 bits (int8); "
        "needs phinetune[quant]",
    )
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention"] = Field(
        "sdpa", description="attention of transformers' Phi-3"
    )
    use_cache: bool = Field(True, description="key-value cache when generating (training never uses it)")
    device: str = Field("auto", description="auto, cpu, cuda, cuda:N or mps; auto for several processes")
    seed: int = Field(0, description="seed of the weights of a `random:` model")

    @model_validator(mode="before")
    @classmethod
    def _old_names(cls, value: Any) -> Any:
        """The keywords that scripts give `from_pretrained`: `torch_dtype` is the older name of `dtype`, torch's own
        dtype objects are taken by name, and what has no effect here is said.
        """
        if not isinstance(value, Mapping):
            return value
        value = dict(value)
        if value.pop("trust_remote_code", False):
            logger.warning("model.trust_remote_code has no effect: only transformers' own classes are used")
        if value.get("device_map", "given") is None:
            del value["device_map"]  # the sample's None: the model goes to model.device
        if "torch_dtype" in value:
            value.setdefault("dtype", value.pop("torch_dtype"))
        if "dtype" in value:
            name = str(value["dtype"]).removeprefix("torch.")
            value["dtype"] = {"bf16": "bfloat16", "fp32": "float32", "fp16": "float16"}.get(name, name)
        return value


class WeightedFile(Section):
    """One of several training files, and how often its rows count."""

    path: str = Field(description="file, datasets folder or hub id")
    weight: float = Field(1.0, gt=0, le=100, description="2 takes every row twice, 0.5 a drawn half of them")


class DataSection(Section):
    """Which chats, and how they become tokens and labels."""

    train: str | list[str | WeightedFile] | None = Field(
        None,
        description="file (.jsonl .json .csv .parquet), datasets folder or hub id; or a list of them, where "
        "{path: …, weight: 2} takes a file's rows twice and weight 0.5 half of them",
    )
    eval: float | str | list[str] | None = Field(
        None, description="held-out chats: a file like `train`, or the fraction of `train` to hold out"
    )
    split: str = Field("train", description="split to read of a datasets folder or hub id")
    format: Literal["auto", "messages", "conversations", "alpaca", "prompt_completion", "text", "tokens"] = Field(
        "auto",
        description="form of the rows; auto looks at each row's keys. text and tokens (input_ids, labels) are "
        "taken as they stand",
    )
    loss_on: Literal["assistant", "last", "all"] = Field(
        "assistant", description="tokens trained on: every assistant turn, the last one, or all tokens"
    )
    system: Literal["keep", "fold", "drop"] = Field(
        "keep",
        description="system messages: keep (refused where the template drops them), "
        "fold into the first user turn, or drop",
    )
    overlong: Literal["cut", "drop"] = Field(
        "cut",
        description="a chat over training_config.max_length: cut its prompt (oldest turns first, answers "
        "never), or drop the chat",
    )
    invalid_rows: Literal["fail", "drop"] = Field(
        "fail", description="rows that can't be used: stop and list them, or drop and count them"
    )
    limit: int | None = Field(None, ge=1, description="use the first N rows only")
    streaming: bool = Field(
        False,
        description="read and encode rows while training, for sets that the disk has no room for; needs "
        "training_config.max_steps, and held-out chats from a file",
    )
    packing: Literal["conversations", "tokens"] = Field(
        "conversations",
        description="what per_device_train_batch_size counts: conversations, or rows filled up to "
        "training_config.max_length tokens with as many conversations as fit",
    )
    tag: str | None = Field(
        None, description="column of the rows by whose values (a task, a language, …) evaluations are split as well"
    )
    seed: int = Field(0, description="seed of the split by fraction and of the rows drawn by weight")

    @field_validator("train", mode="before")
    @classmethod
    def _weighted_files(cls, value: Any) -> Any:
        """Each entry checked here, so that its mistakes are named as what they are and not as a union's."""
        if not isinstance(value, (list, tuple)):
            return value
        return [
            _checked_entry(WeightedFile, entry, f"entry {i}") if isinstance(entry, Mapping) else entry
            for i, entry in enumerate(value, 1)
        ]

    @field_validator("eval")
    @classmethod
    def _fraction(cls, value: Any) -> Any:
        if isinstance(value, float) and not 0 < value < 1:
            raise ValueError(f"the fraction held out must lie between 0 and 1, not {value}")
        return value


Entry = TypeVar("Entry", bound=Section)


def _checked_entry(kind: type[Entry], entry: Mapping[str, Any], where: str) -> Entry:
    """An entry of a list; a mistake in it becomes one sentence."""
    try:
        return kind.model_validate(dict(entry))
    except ValidationError as error:
        raise ValueError("; ".join(_entry_sentence(kind, where, problem) for problem in error.errors())) from None


def _entry_sentence(kind: type[Section], where: str, problem: Any) -> str:
    message = problem["msg"].removeprefix("Value error, ")
    if not problem["loc"]:
        return f"{where}: {message}"
    key = str(problem["loc"][0])
    if problem["type"] == "extra_forbidden":
        return unknown_key(where, key, kind.model_fields)
    return f"{where}: {key}: {message}"


class EngineSection(Section):
    """How a training step is computed."""

    kind: Literal["fast", "plain"] = Field(
        "fast", description="fast: packed rows and fused operators; plain: transformers and PEFT as they are"
    )
    activation_memory: Literal["auto", "none", "all"] | Annotated[int, Field(ge=0)] = Field(
        "auto",
        description="what is recomputed in the backward to save memory: auto (as little as fits the free memory), "
        "none, all layers, or the first N layers",
    )
    share_prefixes: bool = Field(True, description="compute what a step's chats begin with in common once")
    compile: bool = Field(False, description="compile the element-wise operators with torch.compile")


MetricName = Literal["exact_match", "rouge1", "rouge2", "rouge_l", "bleu", "chrf", "json_valid", "json_fields"]


class CustomMetric(Section):
    """A metric of the user's own: a pattern, or a Python function."""

    name: str = Field(pattern=r"^[a-z][a-z0-9_]*$", description="its key in results.json")
    regex: str | None = Field(None, description="counts answers in which this is found")
    function: str | None = Field(
        None,
        description="`module:function` or `file.py:function`, called with an answer, its reference and, if it takes "
        "three arguments, the messages before it; gives a number, true, false, or None to leave the row out",
    )
    less_is_better: bool = Field(False, description="whether a smaller number is the better one")

    @field_validator("regex")
    @classmethod
    def _compiles(cls, value: str | None) -> str | None:
        try:
            re.compile(value or "")
        except re.error as error:
            raise ValueError(f"not a regular expression: {error}") from None
        return value

    @field_validator("function")
    @classmethod
    def _two_parts(cls, value: str | None) -> str | None:
        source, colon, name = (value or "a:b").rpartition(":")
        if not (source and colon and name.isidentifier()):
            raise ValueError(f"write it as module:function or file.py:function, not {value}")
        return value

    @model_validator(mode="after")
    def _one_of_both(self) -> CustomMetric:
        if (self.regex is None) == (self.function is None):
            raise ValueError("give either regex or function")
        if self.name in RESERVED_METRICS:
            raise ValueError(f"`{self.name}` is the name of another number; choose another")
        return self


# What an evaluation counts besides, under the same roof in results.json.
RESERVED_METRICS = {
    *get_args(MetricName),
    *("loss", "perplexity", "token_accuracy", "labelled_tokens", "prompts", "stopped", "repeating", "runtime"),
    *("samples_per_second", "steps_per_second"),
}


class EvaluationSection(Section):
    """What is compared, base against tuned, once training has ended, and what is looked at on the way."""

    enabled: bool = Field(True, description="compare base and tuned model on the held-out chats after training")
    generate: bool = Field(True, description="let both answer the held-out prompts, by which `metrics` are counted")
    metrics: list[MetricName | CustomMetric] = Field(
        ["exact_match", "rouge1", "rouge2", "rouge_l", "bleu", "chrf", "json_valid", "json_fields"],
        description="of answers: " + ", ".join(get_args(MetricName)) + " (json ones where references hold JSON), "
        "{name: …, regex: …}, {name: …, function: file.py:function}",
    )
    max_prompts: int | None = Field(200, ge=1, description="answer the first N held-out prompts at most")
    max_new_tokens: int = Field(256, ge=1, description="tokens an answer may have before it is cut")
    batch_size: Literal["auto"] | Annotated[int, Field(ge=1)] = Field(
        "auto", description="rows scored, and prompts answered, together; auto: as memory allows"
    )
    fixed_prompts: Annotated[int, Field(ge=0)] | list[str] = Field(
        3,
        description="messages answered at every evaluation during training, into samples.jsonl; a number takes the "
        "first held-out prompts",
    )
    metrics_while_training: bool = Field(
        False,
        description="count `metrics` at every evaluation during training; true in any case where "
        "training_config.metric_for_best_model is one of them",
    )
    early_stopping_patience: int | None = Field(
        None,
        ge=1,
        description="stop after so many evaluations without a better training_config.metric_for_best_model (loss)",
    )
    early_stopping_threshold: float = Field(0.0, ge=0, description="how much better counts as better")

    @field_validator("metrics", mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        """Each entry checked here, so that its mistakes are named as what they are and not as a union's."""
        if not isinstance(value, (list, tuple)):
            return value
        known = get_args(MetricName)
        made = [_metric(entry, known) for entry in value]
        names = [one if isinstance(one, str) else one.name for one in made]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"named twice: {', '.join(twice)}")
        return made


def _metric(entry: Any, known: Sequence[str]) -> str | CustomMetric:
    if isinstance(entry, CustomMetric):
        return entry
    if isinstance(entry, Mapping):
        return _checked_entry(CustomMetric, entry, f"metric `{entry.get('name', '?')}`")
    if entry not in known:
        raise ValueError(unknown_key("metrics", str(entry), known).replace("there is no key", "there is no metric"))
    return str(entry)


SHORTHANDS = {"model": "path", "data": "train", "engine": "kind"}


class RunConfig(Section):
    """A whole run. `RunConfig.model_validate` or `load_config` make one."""

    model: ModelSection = Field(default_factory=ModelSection, description="the checkpoint")
    data: DataSection = Field(default_factory=DataSection, description="the chats")
    peft_config: dict[str, Any] = Field(default_factory=dict, description="keys of peft.LoraConfig")
    training_config: dict[str, Any] = Field(default_factory=dict, description="keys of trl.SFTConfig")
    engine: EngineSection = Field(default_factory=EngineSection, description="how a step is computed")
    evaluation: EvaluationSection = Field(default_factory=EvaluationSection, description="base against tuned")

    @model_validator(mode="before")
    @classmethod
    def _shorthands(cls, value: Any) -> Any:
        """`model: PATH`, `data: FILE` and `engine: KIND` stand for the section with that one key; an empty section is
        none.
        """
        if not isinstance(value, Mapping):
            return value
        value = {key: section for key, section in value.items() if section is not None}
        for section, key in SHORTHANDS.items():
            if isinstance(value.get(section), (str, Path, list)):
                short = value[section]
                value[section] = {key: short if isinstance(short, list) else str(short)}
        return value

    @model_validator(mode="after")
    def _bf16_means_the_weights(self) -> RunConfig:
        """As in the guide's scripts, whose model is loaded in bfloat16 for it."""
        if self.model.dtype == "auto" and self.training_config.get("bf16"):
            self.model.dtype = "bfloat16"
        return self

    @property
    def output_dir(self) -> Path:
        """Where the run is written: `training_config.output_dir`, `runs/phinetune` without one."""
        return Path(self.training_config.get("output_dir") or "runs/phinetune")


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML file, apply `section.key=value` overrides, validate.

    Raises:
        ConfigError: no such file, broken YAML (with its line), or any unknown key or bad value.
    """
    file = Path(path)
    try:
        tree = yaml.safe_load(file.read_text(encoding="utf-8"))
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
    """Validate nested dictionaries, with `section.key=value` overrides on top.

    Raises:
        ConfigError: every problem found, each with `where` and its key.
    """
    merged: dict[str, Any] = {key: dict(v) if isinstance(v, Mapping) else v for key, v in tree.items()}
    for override in overrides:
        _apply_override(merged, override)
    try:
        return RunConfig.model_validate(merged)
    except ValidationError as error:
        raise ConfigError([_sentence(where, problem) for problem in error.errors()]) from None


def _apply_override(tree: dict[str, Any], override: str) -> None:
    dotted, equals, text = override.partition("=")
    keys = dotted.strip().split(".")
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
        tree[keys[-1]] = yaml.safe_load(text)
    except yaml.YAMLError:
        tree[keys[-1]] = text


def _sentence(where: str, problem: Any) -> str:
    path = [str(part) for part in problem["loc"]]
    if problem["type"] == "extra_forbidden":
        section = _section_at(path[:-1])
        return unknown_key(": ".join([where, *path[:-1]]), path[-1], section.model_fields)
    message = problem["msg"].removeprefix("Value error, ")
    given = "" if problem["type"] == "value_error" else f" (given: {problem['input']!r})"
    return f"{where}: {'.'.join(path)}: {message}{given}"


def _section_at(path: Sequence[str]) -> type[Section]:
    section: type[Section] = RunConfig
    for part in path:
        section = next(t for t in _types(section.model_fields[part].annotation) if issubclass(t, Section))
    return section


def _types(annotation: Any) -> tuple[type, ...]:
    return tuple(t for t in (get_args(annotation) or (annotation,)) if isinstance(t, type))


def dump_config(config: RunConfig) -> str:
    """The configuration as YAML, every knob with its value in force."""
    return str(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=100))


def describe_knobs() -> list[tuple[str, str, str]]:
    """(key, default, help) of every knob of the sections declared here, in order."""
    rows: list[tuple[str, str, str]] = []
    for name, field in RunConfig.model_fields.items():
        section = field.annotation
        if isinstance(section, type) and issubclass(section, Section):
            rows += [(f"{name}.{k}", str(f.default), f.description or "") for k, f in section.model_fields.items()]
        else:
            rows.append((name, "{}", field.description or ""))
    return rows
