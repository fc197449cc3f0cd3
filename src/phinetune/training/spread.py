"""What a run asks of FSDP: `training_config.fsdp` and `fsdp_config`, or a configuration of `accelerate launch`.

This package shards the layers itself (`phinetune.engine.sharding`), on a CPU as on GPUs, so neither key goes on to
transformers: Accelerate would shard on GPUs alone, and go by DDP on a CPU without a word.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, MutableMapping
from pathlib import Path
from typing import Any

KEYS = ("fsdp", "fsdp_config")
ON = ("true", "full_shard", "auto_wrap")  # the words of `fsdp` that are taken
KEPT = "a layer's gathered weights are dropped after its forward; leave it out"
REFUSED_WORDS = {
    "shard_grad_op": KEPT,
    "offload": "weights are not moved to the CPU between steps; hold them in 4 bits (model.quantization: nf4)",
    "hybrid_shard": "each layer is spread over all processes; leave it out",
    "hybrid_shard_zero2": "each layer is spread over all processes; leave it out",
}
# Keys of `fsdp_config` by what becomes of them. Accelerate writes them with the prefix `fsdp_`.
REFUSED_KEYS = {
    "cpu_offload": REFUSED_WORDS["offload"],
    "offload_params": REFUSED_WORDS["offload"],
    "xla": "XLA's FSDP is not used here; leave it out",
}
IDLE_KEYS = {
    "activation_checkpointing": "engine.activation_memory says what is kept for the backward",
    "auto_wrap_policy": "each decoder layer is a unit",
    "backward_prefetch": "FSDP2 has none",
    "cpu_ram_efficient_loading": "each process reads the base and keeps its part",
    "forward_prefetch": "FSDP2 has none",
    "limit_all_gathers": "FSDP2 has none",
    "min_num_params": "each decoder layer is a unit",
    "sharding_strategy": "reshard_after_forward says it",
    "state_dict_type": "the adapter is whole in each process, and saved as without FSDP",
    "sync_module_states": "FSDP2 has none",
    "transformer_layer_cls_to_wrap": "each decoder layer is a unit",
    "use_orig_params": "FSDP2 has none",
}
OURS = "PHINETUNE_FSDP"  # the same, out of Accelerate's sight, for later runs of one program
ENVIRONMENT = "ACCELERATE_USE_FSDP"  # of `accelerate launch` with an FSDP configuration


def take_spread(
    training: dict[str, Any], problems: list[str], notes: list[str], environment: MutableMapping[str, str] | None = None
) -> bool:
    """Whether the base is to be spread over processes. The two keys stay in `training` for the record of the run.

    Args:
        problems, notes: a sentence is added for what is refused, and for what has no effect.
        environment: the process's own, if left out. What asks Accelerate for FSDP gets another name there.
    """
    environment = os.environ if environment is None else environment
    words = _words(training.get("fsdp"))
    given = _given(training.get("fsdp_config"), problems)
    if environment.get(ENVIRONMENT, "").lower() == "true":
        environment[OURS] = environment.pop(ENVIRONMENT)
    if OURS in environment:
        notes.append("FSDP as the configuration of `accelerate launch` asks for it")
        words = words or ["true"]
        given = {**_from_launcher(environment), **given}
    if not words:
        return False
    unknown = [word for word in words if word not in (*ON, *REFUSED_WORDS)]
    problems += [f"training_config.fsdp: `{word}` is none of {', '.join(ON)}" for word in unknown]
    problems += [f"training_config.fsdp: {word}: {REFUSED_WORDS[word]}" for word in words if word in REFUSED_WORDS]
    _read(given, problems, notes)
    return True


def _words(value: Any) -> list[str]:
    """The words of `fsdp`, which is a flag, a text or a list."""
    if value in (None, False, "", []):
        return []
    parts = value if isinstance(value, (list, tuple)) else str(getattr(value, "value", value)).split()
    words = [str(getattr(part, "value", part)).lower() for part in parts]
    return [] if words == ["false"] else words


def _given(value: Any, problems: list[str]) -> dict[str, Any]:
    """`fsdp_config`, a dictionary or the name of a JSON file, with keys without their prefix."""
    if isinstance(value, str):
        try:
            value = json.loads(Path(value).expanduser().read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            problems.append(f"training_config.fsdp_config: {value}: {error}")
            return {}
    if value is not None and not isinstance(value, Mapping):
        problems.append("training_config.fsdp_config: it should be a dictionary, or a JSON file with one")
        return {}
    return {str(key).removeprefix("fsdp_"): one for key, one in (value or {}).items()}


def _from_launcher(environment: Mapping[str, str]) -> dict[str, Any]:
    """The keys that `accelerate launch` puts into the environment, where their values ask for something."""
    names = {"version": "FSDP_VERSION", "reshard_after_forward": "FSDP_RESHARD_AFTER_FORWARD"}
    names |= {"offload_params": "FSDP_OFFLOAD_PARAMS"}
    return {key: environment[name] for key, name in names.items() if name in environment}


def _read(given: Mapping[str, Any], problems: list[str], notes: list[str]) -> None:
    """Tell what of `fsdp_config` is refused, and what has no effect."""
    where = "training_config.fsdp_config"
    for key, value in given.items():
        off = str(value).lower() in ("false", "none", "0", "")
        if key == "reshard_after_forward":
            problems += [f"{where}: {key}: {value}: {KEPT}"] if str(value).lower() not in ("true", "full_shard") else []
        elif key == "version":
            if str(value) != "2":
                problems.append(f"{where}: version: {value}: FSDP2 alone is used here; set it to 2 or leave it out")
        elif key in REFUSED_KEYS:
            problems += [] if off else [f"{where}: {key}: {REFUSED_KEYS[key]}"]
        elif key in IDLE_KEYS:
            notes += [] if off else [f"{where}: `{key}` has no effect: {IDLE_KEYS[key]}"]
        else:
            known = sorted({"reshard_after_forward", "version", *IDLE_KEYS})
            problems.append(f"{where}: there is no key `{key}` (there are {', '.join(known)})")
