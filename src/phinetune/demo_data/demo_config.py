"""The configuration of the bundled demonstration."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

import yaml

from phinetune.config.run import RunConfig, make_config

CONFIG = "config.yaml"


def demo_config(output_dir: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The demo's configuration: demo/config.yaml with the bundled files' places and `output_dir` filled in.

    Raises:
        ConfigError: an override names an unknown key or holds a bad value.
    """
    here = Path(str(files("phinetune.demo_data")))
    tree = yaml.safe_load((here / CONFIG).read_text(encoding="utf-8"))
    for key in ("train", "eval"):
        tree["data"][key] = str(here / tree["data"][key])
    tree["training_config"]["output_dir"] = str(output_dir)
    return make_config(tree, overrides, where="demo")
