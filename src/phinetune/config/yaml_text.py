"""Reads YAML, and refuses a key that stands twice in one mapping. By YAML's readers the last one wins in silence."""

from __future__ import annotations

from typing import Any

import yaml

from phinetune.errors import ConfigError

MERGE = "tag:yaml.org,2002:merge"  # `<<` takes in the keys of another mapping, and may stand more than once


class _Loader(yaml.SafeLoader):
    """Notes each key that stands twice, with its line and that of the first one."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.twice: list[tuple[str, int, int]] = []

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


def read_yaml(text: str, where: str, *, lines: bool = True) -> Any:
    """Read a YAML document.

    Args:
        where: what error messages call the text.
        lines: whether error messages give lines, too.

    Raises:
        yaml.YAMLError: the text is no YAML.
        ConfigError: keys stand twice in one mapping; the error lists all of them.
    """
    loader = _Loader(text)
    try:
        tree = loader.get_single_data()
    finally:
        loader.dispose()
    if loader.twice:
        raise ConfigError([_sentence(where, lines, *found) for found in loader.twice])
    return tree


def _sentence(where: str, lines: bool, key: str, line: int, first: int) -> str:
    if not lines:
        return f"{where}: `{key}` is given twice; keep one of them"
    return f"{where}:{line}: `{key}` is given twice, first in line {first}; keep one of them"
