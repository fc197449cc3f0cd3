"""The configuration of the run that a job is: before it is planned, and with what the plan chose."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from phinetune.serving.job_places import JobPlaces, file_place
from phinetune.serving.job_request import DpoHyperparameters, JobRequest
from phinetune.serving.store import Row

KEPT = 3  # checkpoints, the newest ones; OpenAI keeps those of the last three epochs
ANSWERED = 20  # prompts of the validation file that base and tuned model answer at the end
MINUTES_LOST = 5  # at most so much work is done again after a kill, where a checkpoint an epoch is further apart
EPOCH, BATCH, RATE = "num_train_epochs", "per_device_train_batch_size", "learning_rate"


def first_config(job: Row, folder: Path) -> dict[str, Any]:
    """The run's configuration as far as the client asked for it; what is open, the plan chooses."""
    request = JobRequest.model_validate_json(job["request"])
    places, wanted = JobPlaces(folder, job["id"]), request.wanted
    training: dict[str, Any] = {
        "output_dir": str(places.run.path),
        "seed": job["seed"],
        "logging_steps": 1,
        "save_strategy": "epoch",
        **_given(EPOCH, wanted.n_epochs),
    }
    if isinstance(wanted.batch_size, int):
        training |= {BATCH: wanted.batch_size, "gradient_accumulation_steps": 1}
    if request.integrations:
        training |= {"report_to": ["wandb"], "run_name": request.integrations[0].wandb.name or job["id"]}
    data: dict[str, Any] = {"train": str(file_place(folder, job["training_file"]))}
    if job["validation_file"]:
        data["eval"] = str(file_place(folder, job["validation_file"]))
        training["eval_strategy"] = "epoch"
    model = {**json.loads(job["base"]), **({"adapter": str(folder / job["adapter"])} if job["adapter"] else {})}
    return {
        "model": model,
        "data": data,
        "training_config": training,
        "objective": _objective(request),
        "evaluation": {"max_prompts": ANSWERED, "neutral": False},
    }


def final_config(first: Mapping[str, Any], plan: Mapping[str, Any], multiplier: Any) -> dict[str, Any]:
    """The configuration that is trained: with numbers in place of what was open, so that a resumed job is the same.

    Args:
        plan: as `phinetune.serving.work.plan_job` returned it.
        multiplier: of the learning rate that the plan chose; `auto` or None is 1.
    """
    training, chosen = dict(first["training_config"]), dict(plan["chosen"])
    kept = (EPOCH, BATCH, RATE, "gradient_accumulation_steps", "warmup_steps", "max_length")
    training |= {key: chosen[key] for key in kept if key in chosen}
    if isinstance(multiplier, (int, float)):
        training[RATE] = float(f"{training[RATE] * multiplier:.4g}")
    interval = save_interval(plan["steps"], training[EPOCH], plan["seconds"])
    training |= {"save_strategy": "steps", "save_steps": interval, "save_total_limit": KEPT}
    if "eval" in first["data"]:
        training |= {"eval_strategy": "steps", "eval_steps": interval}
    peft = {key: chosen[key] for key in ("r", "lora_alpha") if key in chosen}
    data = {**first["data"], **({"system": chosen["system"]} if "system" in chosen else {})}
    return {**first, "data": data, "peft_config": peft, "training_config": training}


def save_interval(steps: int, epochs: float, seconds: float | None) -> int:
    """After how many steps a checkpoint is written: once an epoch, or oftener where that is more than minutes apart."""
    an_epoch = max(1, math.ceil(steps / epochs))
    if not seconds:
        return an_epoch
    pieces = max(1, math.ceil(an_epoch * seconds / steps / (60 * MINUTES_LOST)))
    return max(1, math.ceil(an_epoch / pieces))


def chosen_numbers(final: Mapping[str, Any], request: JobRequest) -> dict[str, Any]:
    """The hyperparameters in force, as the API shows them in place of `auto`."""
    training, wanted = final["training_config"], request.wanted
    batch = training[BATCH] * training.get("gradient_accumulation_steps", 1)
    multiplier = wanted.learning_rate_multiplier
    numbers = {
        "n_epochs": round(training[EPOCH]),
        "batch_size": batch,
        "learning_rate_multiplier": multiplier if isinstance(multiplier, (int, float)) else 1.0,
    }
    if request.kind == "dpo":
        numbers["beta"] = final["objective"].get("beta", 0.1)
    return numbers


def _objective(request: JobRequest) -> dict[str, Any]:
    if request.kind != "dpo":
        return {"kind": "sft"}
    wanted = request.wanted
    beta = wanted.beta if isinstance(wanted, DpoHyperparameters) else None
    return {"kind": "dpo", **({"beta": beta} if isinstance(beta, (int, float)) else {})}


def _given(key: str, value: Any) -> dict[str, Any]:
    return {key: value} if isinstance(value, (int, float)) else {}
