"""Keys of both dictionaries that would do nothing in a run: left out, with a line that says so."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from phinetune.training.value_rules import plain_name

# Keys that no engine reads here, and why.
SCORED = "held-out chats are scored batch by batch in the model's dtype, and no logits are kept"
ROWS = "rows are read and encoded as the section `data` says"
CUT = "data.overlong says what becomes of a chat over max_length; answers are never cut"
IDLE_TRAINING: Mapping[str, str] = {
    "auto_find_batch_size": "`phinetune plan` finds a batch that fits; a run never changes its own",
    "batch_eval_metrics": SCORED,
    "bf16_full_eval": SCORED,
    "dataset_kwargs": ROWS,
    "dataset_num_proc": ROWS,
    "disable_tqdm": "phinetune shows a progress line of its own",
    "do_eval": "training_config.eval_strategy says when held-out chats are scored",
    "do_predict": "training_config.eval_strategy says when held-out chats are scored",
    "do_train": "`phinetune train` always trains",
    "enable_jit_checkpoint": "on SIGTERM and on Ctrl-C a run always saves a checkpoint",
    "eos_token": "stop tokens are found in the chat template",
    "eval_accumulation_steps": SCORED,
    "eval_do_concat_batches": SCORED,
    "eval_packing": SCORED,
    "eval_use_gather_object": SCORED,
    "fp16_full_eval": SCORED,
    "include_for_metrics": SCORED,
    "include_num_input_tokens_seen": "tokens are always counted, without padding",
    "label_names": SCORED,
    "length_column_name": ROWS,
    "local_rank": "the launcher says which process this is",
    "logging_nan_inf_filter": "engine.on_nonfinite says what becomes of a loss that is not finite",
    "pad_token": "padding is masked by length, so its token does not matter",
    "padding_free": "the fast engine pads nothing, and the plain one pads",
    "parallelism_config": "each process trains on one device with the whole model",
    "prediction_loss_only": SCORED,
    "remove_unused_columns": ROWS,
    "router_aux_loss_coef": "Phi-3 has no router",
    "shuffle_dataset": "training_config.train_sampling_strategy says in which order rows are drawn",
    "truncation_mode": CUT,
    "trust_remote_code": "only transformers' own classes are used",
    "use_cache": "training needs no cache; model.use_cache is for answers",
}
# Keys of which the library's default is not what happens here: a line tells of that value, too.
UNLIKE = ("truncation_mode",)
IDLE_PEFT: Mapping[str, str] = {
    "auto_mapping": "the model is always a Phi-3",
    "base_model_name_or_path": "the section `model` names the base",
    "fan_in_fan_out": "Phi-3's layers are linear",
    "inference_mode": "a run always trains",
    "megatron_config": "the model has no layers of Megatron",
    "megatron_core": "the model has no layers of Megatron",
    "peft_version": "the installed version is used",
    "revision": "model.revision names the base's commit",
    "qalora_group_size": "QA-LoRA is for bases quantised by GPTQ, which are not loaded here",
    "runtime_config": "the base is on one device as a whole",
    "use_qalora": "QA-LoRA is for bases quantised by GPTQ, which are not loaded here",
}


def _is_set(value: Any) -> bool:
    return bool(value) and value not in ("no", "none", ["none"])


def _by_steps(value: Any) -> bool:
    return plain_name(value) == "steps"


def _chooses_modules(optimizer: Any) -> bool:
    return plain_name(optimizer).startswith(("galore", "apollo"))


# Keys that do something only together with another one: that key, the value it needs, and whether a value is that.
Need = tuple[str, str, Callable[[Any], bool]]
EVALUATED: Need = ("eval_strategy", "steps or epoch", _is_set)
REPORTED: Need = ("report_to", "a tracker", _is_set)
WORKERS: Need = ("dataloader_num_workers", "1 or more", _is_set)
PUSHED: Need = ("push_to_hub", "true", _is_set)
NEEDS_TRAINING: Mapping[str, Need] = {
    "dataloader_multiprocessing_context": WORKERS,
    "dataloader_persistent_workers": WORKERS,
    "dataloader_prefetch_factor": WORKERS,
    "eval_delay": EVALUATED,
    "eval_steps": ("eval_strategy", "steps", _by_steps),
    "fsdp_config": ("fsdp", "an option", _is_set),
    "hub_always_push": PUSHED,
    "hub_model_id": PUSHED,
    "hub_private_repo": PUSHED,
    "hub_revision": PUSHED,
    "hub_strategy": PUSHED,
    "hub_token": PUSHED,
    "liger_kernel_config": ("use_liger_kernel", "true", _is_set),
    "optim_target_modules": ("optim", "galore_… or apollo_…", _chooses_modules),
    "packing_strategy": ("packing", "true", _is_set),
    "project": REPORTED,
    "run_name": REPORTED,
    "save_steps": ("save_strategy", "steps", _by_steps),
    "trackio_bucket_id": REPORTED,
    "trackio_space_id": REPORTED,
    "trackio_static_space_id": REPORTED,
}
# Schedules that transformers makes without a warm-up, and the one that is the same with a warm-up.
WITHOUT_WARMUP: Mapping[str, str | None] = {
    "constant": "constant_with_warmup",
    "greedy": None,
    "reduce_lr_on_plateau": None,
}
WITHOUT_OPTIONS = ("constant", "constant_with_warmup")  # schedules that take no `lr_scheduler_kwargs`
NEEDS_PEFT: Mapping[str, Need] = {
    "ensure_weight_tying": ("modules_to_save", "an embedding, or with trainable_token_indices", _is_set)
}


def leave_out_idle(
    where: str,
    given: dict[str, Any],
    idle: Mapping[str, str],
    needs: Mapping[str, Need],
    defaults: Mapping[str, Any],
    notes: list[str],
) -> dict[str, Any]:
    """The keys without those that would do nothing. A line in `notes` tells of each whose value is not the default.

    Args:
        where: `training_config` or `peft_config`.
        defaults: the values of keys that are not given.
    """
    kept: dict[str, Any] = {}
    for key, value in given.items():
        owner, wanted, holds = needs.get(key, (None, "", _is_set))
        if key in idle:
            why = idle[key]
        elif owner and not holds(given.get(owner, defaults.get(owner))):
            why = f"it is for `{owner}: {wanted}`"
        else:
            kept[key] = value
            continue
        if value is not None and (key in UNLIKE or value != defaults.get(key)):
            notes.append(f"{where}: `{key}` has no effect: {why}")
    return kept


def overruled(training: Mapping[str, Any]) -> list[str]:
    """A line for each key of `training_config` that does nothing beside the value of another one. It stays in the
    arguments, which a resumed run is held against.
    """
    schedule = plain_name(training.get("lr_scheduler_type"))
    found = {}
    if training.get("warmup_steps") and schedule in WITHOUT_WARMUP:
        other = WITHOUT_WARMUP[schedule]
        found["warmup_steps"] = f"`{schedule}` has no warm-up" + (f"; `{other}` has" if other else "")
    if training.get("lr_scheduler_kwargs") and schedule in WITHOUT_OPTIONS:
        found["lr_scheduler_kwargs"] = f"`{schedule}` takes no options"
    if "num_train_epochs" in training and training.get("max_steps", -1) > 0:
        found["num_train_epochs"] = f"`max_steps: {training['max_steps']}` counts"
    return [f"training_config: `{key}` has no effect: {why}" for key, why in found.items()]
