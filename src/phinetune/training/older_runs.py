"""What decided the result of a run that an older version started, as far as its files tell: it recorded none of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from phinetune.checkpoints.adapters import read_base
from phinetune.checkpoints.device import pick_dtype
from phinetune.engine.choice import choose_engine
from phinetune.run_folder import RunFolder
from phinetune.training.prepare import PreparedRun, as_it_began, settle
from phinetune.training.recorded import HELD_OUT_COUNT, LIBRARIES, TRAIN_COUNT, WEIGHTS, Record, count_of, settings_of
from phinetune.training.settings import make_training_args


def record_of_older(folder: RunFolder, checkpoint: Path, prepared: PreparedRun, start: Mapping[str, Any]) -> Record:
    """The record of a run, made of its config.yaml, its start.json and a checkpoint. What these lack is left out.

    Args:
        prepared: the run as it would go on; it gives the device and the shape of the model.
        start: what start.json holds.

    Raises:
        PhinetuneError: the run's own configuration is refused by now.
    """
    settled, _ = as_it_began(settle(folder.read_config()), start)
    config, settings, device = settled.config, settled.settings, prepared.device
    dtype = pick_dtype(config.model.dtype, device)
    engine = choose_engine(config, settings.training, settings.peft, settings.max_length, dtype, prepared.shape)
    args = make_training_args(settings, folder.path, device, dtype, fast=engine.fast is not None)
    then = dataclasses.replace(prepared, **vars(settled), engine=engine, args=args, dtype=dtype)
    told_by_machine = ("versions.", "processes.")
    record = {key: value for key, value in settings_of(then).items() if not key.startswith(told_by_machine)}
    machine, data, base = start.get("environment") or {}, start.get("data") or {}, read_base(checkpoint)
    record |= {f"versions.{name}": machine[name] for name in LIBRARIES if name in machine}
    if "processes" in machine:
        record["processes.number"] = int(machine["processes"])
    if "device" in machine:
        record["model.device"] = str(machine["device"]).partition(":")[0]
    if base:
        record[WEIGHTS] = base.fingerprint
    counts = {TRAIN_COUNT: data.get("train"), HELD_OUT_COUNT: data.get("held_out")}
    return record | {key: count_of(report) for key, report in counts.items() if report}
