"""What the keys of an adapter_config.json may hold, so that nothing of a stranger's file reaches PEFT unchecked."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

MOST_LAYERS = 1000  # layers that a config.json or `layer_replication` may ask for
LARGEST = 2**31  # ranks and numbers of layers or tokens are below it


def wrong_values(tree: Mapping[str, Any]) -> list[str]:
    """A problem for each key of an adapter_config.json whose value PEFT can't be given."""
    return [
        f"`{key}` should be {what} (given: {_short(tree[key])})"
        for key, (fits, what) in RULES.items()
        if key in tree and not fits(tree[key])
    ]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]} …"


def _is_count(value: Any) -> bool:
    """A whole number from 0 on. True and False are none."""
    return type(value) is int and 0 <= value < LARGEST


def _is_rank(value: Any) -> bool:
    return _is_count(value) and value > 0


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e15


def _is_share(value: Any) -> bool:
    return _is_number(value) and 0 <= value <= 1


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_switch(value: Any) -> bool:
    return isinstance(value, bool)


def _is_replication(value: Any) -> bool:
    if not isinstance(value, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in value):
        return False
    if not all(_is_count(number) for pair in value for number in pair) or any(first >= end for first, end in value):
        return False
    return bool(sum(end - first for first, end in value) <= MOST_LAYERS)


def _list_of(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(fits(one) for one in value)


def _map_of(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(fits(one) for one in value.values())


def _any_of(*rules: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: any(fits(value) for fits in rules)


def _is_null(value: Any) -> bool:
    return value is None


def _is_unset(value: Any) -> bool:
    return not value


Rule = tuple[Callable[[Any], bool], str]
NAMES: Rule = (_any_of(_is_null, _is_text, _list_of(_is_text)), "a regular expression, a list of names or null")
NAME_LIST: Rule = (_any_of(_is_null, _list_of(_is_text)), "a list of names or null")
TEXT: Rule = (_any_of(_is_null, _is_text), "a text or null")
SWITCH: Rule = (_any_of(_is_null, _is_switch), "true or false")
RULES: Mapping[str, Rule] = {
    "r": (_is_rank, "a whole number of 1 or more"),
    "lora_alpha": (_is_number, "a number"),
    "lora_dropout": (_is_share, "a number from 0 to 1"),
    "rank_pattern": (_any_of(_is_null, _map_of(_is_rank)), "a whole number of 1 or more for each pattern"),
    "alpha_pattern": (_any_of(_is_null, _map_of(_is_number)), "a number for each pattern"),
    "target_modules": NAMES,
    "exclude_modules": NAMES,
    "layers_pattern": NAMES,
    "modules_to_save": NAME_LIST,
    "target_parameters": NAME_LIST,
    "layers_to_transform": (
        _any_of(_is_null, _is_count, _list_of(_is_count)),
        "the number of a layer, a list of them or null",
    ),
    "layer_replication": (
        _any_of(_is_null, _is_replication),
        f"pairs [first, last + 1] of layers, {MOST_LAYERS} layers in all at most, or null",
    ),
    "trainable_token_indices": (
        _any_of(_is_null, _list_of(_is_count), _map_of(_list_of(_is_count))),
        "a list of token ids, such a list for each embedding, or null",
    ),
    "alora_invocation_tokens": (_any_of(_is_null, _list_of(_is_count)), "a list of token ids or null"),
    "bias": (lambda value: value in ("none", "all", "lora_only"), "none, all or lora_only"),
    "init_lora_weights": (_any_of(_is_null, _is_switch, _is_text), "true, false or the name of a beginning"),
    "base_model_name_or_path": TEXT,
    "revision": TEXT,
    "task_type": TEXT,
    "fan_in_fan_out": SWITCH,
    "use_rslora": SWITCH,
    "use_dora": SWITCH,
    "lora_bias": SWITCH,
    # PEFT imports the Python module that `megatron_core` names, as soon as this is set.
    "megatron_config": (_is_unset, "null: layers of Megatron are not supported"),
}
