"""What of a run is shared when it is pushed: adapter or merged model, tokenizer, settings and card.

Never shared: the data, answers to it, logs, optimizer states, tokens, and where files lie on this machine.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from phinetune.checkpoints.adapters import ADAPTER_CONFIG, ADAPTER_WEIGHTS, BASE_FILE, read_adapter_config, read_base
from phinetune.checkpoints.load import Base
from phinetune.checkpoints.opened import recorded_config
from phinetune.checkpoints.tokenizer import TOKENIZER_FILES
from phinetune.config.run import RunConfig, WeightedFile, dump_config
from phinetune.errors import ModelError
from phinetune.export.hub.card import SECRETS, hub_id, settings_section, training_sections, write_card
from phinetune.export.hub.merged_card import write_merged_card
from phinetune.export.merge.merge import merge_run
from phinetune.export.merge.merged import MERGED_FILE
from phinetune.files import write_text
from phinetune.run_folder import CARD, CONFIG, MARK, RunFolder

# As an adapter's folder has them; what is not there is left out.
COPIED = (ADAPTER_WEIGHTS, "generation_config.json", *TOKENIZER_FILES)
DATA_FILES = (".jsonl", ".json", ".csv", ".parquet")


@dataclass(frozen=True)
class Shared:
    """What is known of an adapter, as others may read it: no path of this machine, no token.

    Attributes:
        base: which weights the adapter belongs to; its path is a hub id, `starter`, `random:…` or a folder's name.
        config: the run's configuration.
        results: `base` and what results.json says of data, training and evaluation.
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


def read_shared(source: Path) -> Shared:
    """What is known of a run, one of its checkpoints or an adapter folder.

    Raises:
        ModelError: no adapter there.
    """
    lora = read_adapter_config(source).to_dict()
    config = recorded_config(source).model_copy(deep=True)
    base = read_base(source) or Base(config.model.path, config.model.revision, "")
    if not hub_id(asdict(base)):
        base = replace(base, path=_name(base.path))
    config.model.path = base.path
    _forget_places(config)
    return Shared(source, base, config, {"base": asdict(base), **_results(source)}, lora)


def _results(source: Path) -> dict[str, Any]:
    """What results.json says that others may read: of a checkpoint only the data is its own, too."""
    for folder, parts in ((source, ("data", "training", "evaluation")), (source.parent, ("data",))):
        if RunFolder(folder).is_finished:
            tree = json.loads(RunFolder(folder).results.read_text(encoding="utf-8"))
            found = {part: tree[part] for part in parts if tree.get(part)}
            for report in filter(None, found.get("data", {}).values()):
                report["source"] = ", ".join(_name(place) for place in str(report["source"]).split(", "))
            return found
    return {}


def _forget_places(config: RunConfig) -> None:
    """Paths become names, tokens go."""
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
    if config.model.tokenizer:
        config.model.tokenizer = _name(config.model.tokenizer)
    kept = {key: value for key, value in config.training_config.items() if key not in SECRETS}
    config.training_config = kept | {"output_dir": config.output_dir.name}


def _name(place: str) -> str:
    """A path's last part; an id on the hub, `starter` or `random:…` as it is."""
    path = Path(place).expanduser()
    is_path = path.is_absolute() or path.exists() or place.startswith(".") or path.suffix in DATA_FILES
    return path.name if is_path and not place.startswith("random:") else place


def write_adapter(shared: Shared, folder: Path, repo: str) -> None:
    """The adapter as PEFT and phinetune read it, with the card for `repo`."""
    for name in COPIED:
        if (shared.source / name).is_file():
            shutil.copyfile(shared.source / name, folder / name)
    tree = json.loads((shared.source / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    tree["base_model_name_or_path"] = shared.base.path
    write_text(folder / ADAPTER_CONFIG, json.dumps(tree, indent=2, ensure_ascii=False) + "\n")
    if shared.base.fingerprint:
        write_text(folder / BASE_FILE, shared.base.to_json())
    if RunFolder(shared.source).is_run or RunFolder(shared.source.parent).is_run:
        write_text(folder / CONFIG, MARK + dump_config(shared.config))
    write_text(folder / CARD, write_card(shared.config, shared.results, shared.lora, repo=repo))


def write_merged(shared: Shared, folder: Path, repo: str) -> None:
    """The adapter merged into its base, a plain transformers model, with the card for `repo`.

    Raises:
        ModelError: it can't be merged.
    """
    record = merge_run(shared.source, folder).record
    record["base"] = asdict(shared.base)
    record["adapter"]["path"] = shared.source.resolve().name
    write_text(folder / MERGED_FILE, json.dumps(record, indent=2, ensure_ascii=False) + "\n")
    settings = settings_section(shared.config, shared.lora)
    training = training_sections(shared.results)
    write_text(folder / CARD, write_merged_card(repo, record, repo=repo, training=training, settings=settings))


def check_holds_no(token: str, folder: Path) -> None:
    """Make sure that no text in `folder` holds the token: scripts have it in unlikely places.

    Raises:
        ModelError: one does.
    """
    texts = [file for file in sorted(folder.iterdir()) if file.suffix not in (".safetensors", ".model")]
    found = [file.name for file in texts if token.encode() in file.read_bytes()]
    if found:
        raise ModelError(f"{', '.join(found)}: your access token stands in it; nothing was pushed; take it out first")
