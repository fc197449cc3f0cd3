"""What a push publishes of a run: the adapter or the merged model, tokenizer, settings and card.

It never publishes the data, answers to it, logs, optimizer states, access tokens or paths of this machine.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from phinetune.checkpoints.adapter_fit import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from phinetune.checkpoints.adapters import BASE_FILE, read_adapter_config, read_base
from phinetune.checkpoints.load import Base
from phinetune.checkpoints.opened import recorded_config
from phinetune.checkpoints.tokenizer import TOKENIZER_FILES
from phinetune.config.data import OtherSplit, WeightedFile
from phinetune.config.own_metrics import name_places
from phinetune.config.run import SECRETS, RunConfig, dump_config
from phinetune.errors import ModelError
from phinetune.exporting.hub.card import hub_id, settings_section, training_sections, write_card
from phinetune.exporting.hub.merged_card import write_merged_card
from phinetune.exporting.merge.merge import merge_run
from phinetune.exporting.merge.merged import MERGED_FILE
from phinetune.files import write_text
from phinetune.run_folder import CARD, CONFIG, MARK, RunFolder

# Files that are copied from the adapter's folder, if they are there.
COPIED = (ADAPTER_WEIGHTS, "generation_config.json", *TOKENIZER_FILES)
# Of results.json; of `curves` the card leaves out what shows rows.
PUBLISHED = ("data", "training", "evaluation", "curves", "kept")
DATA_FILES = (".jsonl", ".json", ".csv", ".parquet")


@dataclass(frozen=True)
class Published:
    """What others may read about an adapter. It holds no path of this machine and no access token.

    Attributes:
        source: the adapter's folder. This path is not published.
        base: which weights the adapter belongs to; its path is a hub id, `starter`, `random:…` or a folder's name.
        config: the run's configuration.
        results: `base`, and what results.json holds of data, training and evaluation.
        lora: PEFT's configuration of the adapter.
    """

    source: Path
    base: Base
    config: RunConfig
    results: Mapping[str, Any]
    lora: Mapping[str, Any]

    @property
    def base_id(self) -> str | None:
        """The base's id on the hub, if it is there."""
        return hub_id(asdict(self.base))


def read_published(source: Path) -> Published:
    """Read what may be published about a run, one of its checkpoints or an adapter folder.

    Raises:
        ModelError: there is no adapter in `source`.
    """
    lora = read_adapter_config(source).to_dict()
    config = recorded_config(source).model_copy(deep=True)
    base = read_base(source) or Base(config.model.path, config.model.revision, "")
    if not hub_id(asdict(base)):
        base = replace(base, path=_name(base.path))
    config.model.path = base.path
    _remove_private(config)
    return Published(source, base, config, {"base": asdict(base), **_results(source)}, lora)


def _results(source: Path) -> dict[str, Any]:
    """What others may read of results.json.

    A run's checkpoint has the data of its run. Training and evaluation are those of the finished run, not its own.
    """
    for folder, parts in ((source, PUBLISHED), (source.parent, ("data",))):
        if RunFolder(folder).is_finished:
            tree = json.loads(RunFolder(folder).results.read_text(encoding="utf-8"))
            found = {part: tree[part] for part in parts if tree.get(part)}
            for report in (one for one in found.get("data", {}).values() if one and "source" in one):
                report["source"] = ", ".join(_name(place) for place in str(report["source"]).split(", "))
            return found
    return {}


def _remove_private(config: RunConfig) -> None:
    """Replace each path in `config` by a name, and remove access tokens."""
    data = config.data
    if isinstance(data.train, list):
        data.train = [
            _name(entry) if isinstance(entry, str) else WeightedFile(path=_name(entry.path), weight=entry.weight)
            for entry in data.train
        ]
    elif data.train:
        data.train = _name(data.train)
    if isinstance(data.eval, list):
        data.eval = [_name(place) for place in data.eval]
    elif isinstance(data.eval, str):
        data.eval = _name(data.eval)
    elif isinstance(data.eval, OtherSplit) and data.eval.path:
        data.eval = data.eval.model_copy(update={"path": _name(data.eval.path)})
    if isinstance(data.test, list):
        data.test = [_name(place) for place in data.test]
    elif isinstance(data.test, str):
        data.test = _name(data.test)
    elif data.test and data.test.path:
        data.test = data.test.model_copy(update={"path": _name(data.test.path)})
    if config.model.tokenizer:
        config.model.tokenizer = _name(config.model.tokenizer)
    for metric in config.evaluation.own:
        name_places(metric, _name)
    kept = {key: value for key, value in config.training_config.items() if key not in SECRETS}
    config.training_config = kept | {"output_dir": config.output_dir.name}


def _name(place: str) -> str:
    """The last part of a path. An id on the hub, `starter` or `random:…` is returned unchanged."""
    path = Path(place).expanduser()
    is_path = path.is_absolute() or path.exists() or place.startswith(".") or path.suffix in DATA_FILES
    return path.name if is_path and not place.startswith("random:") else place


def write_adapter(published: Published, folder: Path, repo: str) -> None:
    """Write the adapter as PEFT and phinetune read it, with the card for `repo`."""
    for name in COPIED:
        if (published.source / name).is_file():
            shutil.copyfile(published.source / name, folder / name)
    tree = json.loads((published.source / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    tree["base_model_name_or_path"] = published.base.path
    write_text(folder / ADAPTER_CONFIG, json.dumps(tree, indent=2, ensure_ascii=False) + "\n")
    if published.base.fingerprint:
        write_text(folder / BASE_FILE, published.base.to_json())
    if RunFolder(published.source).is_run or RunFolder(published.source.parent).is_run:
        write_text(folder / CONFIG, MARK + dump_config(published.config))
    write_text(folder / CARD, write_card(published.config, published.results, published.lora, repo=repo))


def write_merged(published: Published, folder: Path, repo: str) -> None:
    """Write the adapter merged into its base, a model for transformers alone, with the card for `repo`.

    Raises:
        ModelError: the adapter can't be merged.
    """
    record = merge_run(published.source, folder).record
    record["base"] = asdict(published.base)
    record["adapter"]["path"] = published.source.resolve().name
    write_text(folder / MERGED_FILE, json.dumps(record, indent=2, ensure_ascii=False) + "\n")
    settings = settings_section(published.config, published.lora)
    training = training_sections(published.results)
    write_text(folder / CARD, write_merged_card(repo, record, repo=repo, training=training, settings=settings))


def check_holds_no(token: str, folder: Path) -> None:
    """Make sure that no text file in `folder` holds the access token. Scripts may leave it in unlikely places.

    Raises:
        ModelError: a file holds it.
    """
    texts = [file for file in sorted(folder.iterdir()) if file.suffix not in (".safetensors", ".model")]
    found = [file.name for file in texts if token.encode() in file.read_bytes()]
    if found:
        raise ModelError(f"{', '.join(found)}: your access token is in it, so nothing was pushed; remove it first")
