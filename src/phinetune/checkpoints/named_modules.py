"""Every key of `peft_config` that names modules, layers, parameters or tokens, matched with the model.

PEFT passes over an entry that matches nothing. Here it is refused, with the names that there are.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel

from phinetune.checkpoints.patterns import why_no_end
from phinetune.checkpoints.target_modules import ALL_LINEAR, FUSED, linear_layers, resolve_targets
from phinetune.errors import ConfigError

SPLIT = re.compile(rf"(?<![A-Za-z0-9_])({'|'.join(FUSED)})(?![A-Za-z0-9_])")


def resolve_names(model: PreTrainedModel, peft: Mapping[str, Any]) -> dict[str, Any]:
    """`peft_config` with this model's names: split projections become the fused ones that hold them.

    Args:
        model: the base without an adapter; its weights don't matter.

    Raises:
        ConfigError: an entry matches nothing, or two entries ask for different things of one module; all are listed.
            Or a regular expression is broken or has no end; these come first, because they can't be matched.
    """
    problems = [f"peft_config.{problem}" for problem in why_no_end(peft, [name for name, _ in model.named_modules()])]
    if problems:
        raise ConfigError(problems)
    names = _Names(model, problems)
    resolved = dict(peft)
    for key, resolve in RESOLVERS.items():
        if peft.get(key) is not None:
            resolved[key] = resolve(names, key, peft[key])
    try:
        resolved["target_modules"] = _targets(names, peft)
    except ConfigError as error:
        problems[:0] = error.problems
    if problems:
        raise ConfigError(problems)
    return resolved


def told_split(peft: Mapping[str, Any]) -> list[str]:
    """A line for each key that names some of the projections which Phi-3 has in one layer, so that all are meant."""
    lines = []
    for key in ("target_modules", "exclude_modules", "modules_to_save", "rank_pattern", "alpha_pattern"):
        entries = [] if isinstance(peft.get(key), str) else [e for e in peft.get(key) or () if isinstance(e, str)]
        named = {found[1] for entry in entries for found in SPLIT.finditer(entry)}
        for layer in dict.fromkeys(FUSED.values()):
            parts = [part for part in FUSED if FUSED[part] == layer]
            given = [part for part in parts if part in named]
            if given and len(given) < len(parts):
                names = ", ".join(f"`{part}`" for part in given)
                lines.append(
                    f"peft_config.{key}: {names}: taken as `{layer}`, one layer here that holds {', '.join(parts)}"
                )
    return lines


class _Names:
    """The names of a model's modules, and the problems that were found with others."""

    def __init__(self, model: PreTrainedModel, problems: list[str]) -> None:
        self.model, self.problems = model, problems
        self.linear = linear_layers(model)
        self.modules = [name for name, _ in model.named_modules() if name]
        self.parameters = [name for name, _ in model.named_parameters()]
        self.layers = int(model.config.num_hidden_layers)
        self.tokens = int(model.config.vocab_size)

    def fused(self, entry: str, among: Iterable[str], matches: Callable[[str, str], bool]) -> str:
        """An entry in the model's own names."""
        if any(matches(entry, name) for name in among):
            return entry
        return SPLIT.sub(lambda found: FUSED[found[1]], entry)

    def refuse(self, key: str, entry: Any, what: str, there_are: Iterable[str]) -> None:
        self.problems.append(f"peft_config.{key}: `{entry}` matches no {what}; there are {', '.join(there_are)}")


def _is_or_ends(entry: str, name: str) -> bool:
    """As PEFT matches an entry of a list."""
    return name == entry or name.endswith(f".{entry}")


def _matches_pattern(entry: str, name: str) -> bool:
    """As PEFT matches a key of `rank_pattern` and `alpha_pattern`."""
    return re.match(rf"(.*\.)?({entry})$", name) is not None


def _last_names(names: Iterable[str]) -> list[str]:
    """The last parts of names, without the numbers of layers."""
    return sorted({last for name in names if not (last := name.rsplit(".", 1)[-1]).isdigit()})


def _targets(names: _Names, peft: Mapping[str, Any]) -> Any:
    wanted = peft.get("target_modules")
    if wanted is None and peft.get("target_parameters"):
        return None  # PEFT's meaning: nothing but these parameters
    targets = resolve_targets(names.model, wanted)
    # PEFT takes a choice of layers for a list only.
    by_layer = peft.get("layers_to_transform") is not None
    return _last_names(names.linear) if targets == ALL_LINEAR and by_layer else targets


def _excluded(names: _Names, key: str, wanted: Any) -> Any:
    if isinstance(wanted, str):
        if not any(re.fullmatch(wanted, name) for name in names.linear):
            names.refuse(key, wanted, "linear layer", _last_names(names.linear))
        return wanted
    return _entries(names, key, wanted, names.linear, "linear layer")


def _saved(names: _Names, key: str, wanted: Any) -> Any:
    return _entries(names, key, wanted, names.modules, "module")


def _entries(names: _Names, key: str, wanted: Iterable[str], among: Iterable[str], what: str) -> list[str]:
    among = list(among)
    resolved = list(dict.fromkeys(names.fused(entry, among, _is_or_ends) for entry in wanted))
    for entry in resolved:
        if not any(_is_or_ends(entry, name) for name in among):
            names.refuse(key, entry, what, _last_names(among))
    return resolved


def _pattern(names: _Names, key: str, wanted: Mapping[str, Any]) -> dict[str, Any]:
    """`rank_pattern` or `alpha_pattern`."""
    resolved: dict[str, Any] = {}
    for entry, value in wanted.items():
        name = names.fused(str(entry), names.linear, _matches_pattern)
        whole = key == "alpha_pattern" or isinstance(value, int)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not whole or not 0 < value < 1e15:
            kind = "a number above 0" if key == "alpha_pattern" else "a whole number of 1 or more"
            names.problems.append(f"peft_config.{key}.{entry}: it should be {kind} (given: {value!r})")
        if not any(_matches_pattern(name, layer) for layer in names.linear):
            names.refuse(key, entry, "linear layer", _last_names(names.linear))
        elif resolved.setdefault(name, value) != value:
            names.problems.append(
                f"peft_config.{key}: {', '.join(f'`{one}`' for one in wanted)}: `{name}` is one layer here and can't "
                f"have both {resolved[name]} and {value}"
            )
    return resolved


def _layers(names: _Names, key: str, wanted: Any) -> Any:
    """`layers_to_transform`."""
    numbers = [wanted] if isinstance(wanted, int) else wanted
    if not numbers:
        names.problems.append(f"peft_config.{key}: the list is empty; leave the key out for all layers")
    for number in numbers:
        if not 0 <= number < names.layers:
            names.problems.append(f"peft_config.{key}: there is no layer {number}; there are 0 to {names.layers - 1}")
    return wanted


def _layers_pattern(names: _Names, key: str, wanted: Any) -> Any:
    for entry in [wanted] if isinstance(wanted, str) else wanted:
        if not any(re.match(rf"(?:^|.*?\.){re.escape(entry)}\.\d+\.", name) for name in names.modules):
            names.refuse(key, entry, "list of layers", ["layers"])
    return wanted


def _replication(names: _Names, key: str, wanted: Any) -> Any:
    """`layer_replication`: pairs of a first layer and the one after the last."""
    for pair in wanted:
        if len(pair) != 2 or not 0 <= pair[0] < pair[1] <= names.layers:
            names.problems.append(
                f"peft_config.{key}: {list(pair)} is no range of layers; write [first, last + 1] within 0 to "
                f"{names.layers}"
            )
    return wanted


def _parameters(names: _Names, key: str, wanted: Any) -> Any:
    for entry in wanted:
        if not any(_is_or_ends(entry, name) for name in names.parameters):
            names.refuse(key, entry, "parameter", sorted({".".join(n.rsplit(".", 2)[-2:]) for n in names.parameters}))
    return wanted


def _tokens(names: _Names, key: str, wanted: Any) -> Any:
    """`trainable_token_indices` or `alora_invocation_tokens`: ids, or ids by the name of an embedding."""
    by_name = wanted if isinstance(wanted, Mapping) else {"": wanted}
    for name, ids in by_name.items():
        if name and not any(_is_or_ends(name, module) for module in _embeddings(names.model)):
            names.refuse(key, name, "embedding", _embeddings(names.model))
        if not ids:
            names.problems.append(f"peft_config.{key}: there is no token in it; leave the key out")
        last = names.tokens - 1
        bad = [token for token in ids if not 0 <= token <= last]
        names.problems += [f"peft_config.{key}: there is no token {token}; there are 0 to {last}" for token in bad]
    return wanted


def _embeddings(model: PreTrainedModel) -> list[str]:
    held: list[nn.Module | None] = [model.get_input_embeddings(), model.get_output_embeddings()]
    return [name for name, module in model.named_modules() if any(module is one for one in held)]


RESOLVERS: Mapping[str, Callable[[_Names, str, Any], Any]] = {
    "exclude_modules": _excluded,
    "modules_to_save": _saved,
    "rank_pattern": _pattern,
    "alpha_pattern": _pattern,
    "layers_to_transform": _layers,
    "layers_pattern": _layers_pattern,
    "layer_replication": _replication,
    "target_parameters": _parameters,
    "trainable_token_indices": _tokens,
    "alora_invocation_tokens": _tokens,
}


def check_patterns(model: PeftModel) -> None:
    """Make sure that each key of `rank_pattern` and `alpha_pattern` is a layer that has an adapter.

    Raises:
        ConfigError: a key matches none; the error lists all of them.
    """
    config = model.peft_config["default"]
    adapted = [name for name, layer in model.get_base_model().named_modules() if isinstance(layer, LoraLayer)]
    there_are = ", ".join(_last_names(adapted))
    problems = [
        f"peft_config.{key}: `{entry}` matches no layer that has an adapter; these are {there_are}"
        for key in ("rank_pattern", "alpha_pattern")
        for entry in getattr(config, key)
        if not any(_matches_pattern(entry, name) for name in adapted)
    ]
    if problems:
        raise ConfigError(problems)
