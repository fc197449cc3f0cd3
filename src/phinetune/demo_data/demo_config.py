"""The configurations of the bundled demonstrations."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

import yaml

from phinetune.config.run import RunConfig, make_config

CONFIG = "config.yaml"
# The demo of preferences: supervised fine-tuning on two styles of answer, then dpo on pairs of them.
STYLES, PREFERENCE = "styles.yaml", "preference.yaml"


def demo_config(output_dir: Path, overrides: Sequence[str] = (), name: str = CONFIG) -> RunConfig:
    """A demo's configuration with the bundled files' places and `output_dir` filled in.

    Args:
        name: one of the files in phinetune/demo_data.

    Raises:
        ConfigError: an override names an unknown key or holds a bad value.
    """
    here = Path(str(files("phinetune.demo_data")))
    tree = yaml.safe_load((here / name).read_text(encoding="utf-8"))
    for key in ("train", "eval"):
        tree["data"][key] = str(here / tree["data"][key])
    tree["training_config"]["output_dir"] = str(output_dir)
    return make_config(tree, overrides, where="demo")
