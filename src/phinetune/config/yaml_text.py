"""Reads YAML of a limited size, and refuses a key that stands twice in one mapping.

A short text with aliases of aliases can stand for more values than there is memory. Of a key that stands twice, YAML's
readers take the last one in silence.
"""

from __future__ import annotations

from typing import Any

import yaml

from phinetune.errors import ConfigError

LONGEST = 1 << 20  # letters of a text
MOST_VALUES = 100_000  # values that it may stand for, every alias written out
TOO_MANY = f"its aliases (`*name`) stand for more than {MOST_VALUES:,} values"
MERGE = "tag:yaml.org,2002:merge"  # `<<` takes in the keys of another mapping, and may stand more than once


class _Loader(yaml.SafeLoader):
    """Notes each key that stands twice, with its line and that of the first one. Counts what merge keys take in."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.twice: list[tuple[str, int, int]] = []
        self.taken = 0

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        lines: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == MERGE:
                continue
            line = key.start_mark.line + 1
            if (key.tag, key.value) in lines:
                self.twice.append((key.value, line, lines[key.tag, key.value]))
            lines.setdefault((key.tag, key.value), line)
        return node

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Called for each mapping, and again wherever a merge key takes it in, before its keys are copied there."""
        super().flatten_mapping(node)
        self.taken += len(node.value)
        if self.taken > MOST_VALUES:
            raise yaml.YAMLError(TOO_MANY)


def read_yaml(text: str, where: str, *, lines: bool = True) -> Any:
    """What a YAML text holds: plain values, lists and dictionaries.

    Args:
        where: what error messages call the text.
        lines: whether error messages give lines, too.

    Raises:
        yaml.YAMLError: the text is broken or too long, or stands for too many values.
        ConfigError: keys stand twice in one mapping; the error lists all of them.
    """
    if len(text) > LONGEST:
        raise yaml.YAMLError(f"{len(text):,} letters; at most {LONGEST:,} are read")
    loader = _Loader(text)
    try:
        tree = loader.get_single_data()
    except RecursionError:
        raise yaml.YAMLError("values lie too deep in one another") from None
    except (ValueError, OverflowError, TypeError, AttributeError, LookupError) as error:  # such as a 13th month
        raise yaml.YAMLError(f"a value can't be read: {error}") from None
    finally:
        loader.dispose()
    _check_count(tree)
    if loader.twice:
        raise ConfigError([_sentence(where, lines, *found) for found in loader.twice])
    return tree


def _check_count(tree: Any) -> None:
    """Count the values with every alias written out. A value that holds itself has no end, so it is refused, too."""
    waiting, count = [tree], 0
    while waiting:
        value = waiting.pop()
        parts = [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list | set) else []
        count += 1 + len(parts)
        if count > MOST_VALUES:
            raise yaml.YAMLError(TOO_MANY)
        waiting.extend(parts)


def _sentence(where: str, lines: bool, key: str, line: int, first: int) -> str:
    if not lines:
        return f"{where}: `{key}` is given twice; keep one of them"
    return f"{where}:{line}: `{key}` is given twice, first in line {first}; keep one of them"
