"""What of a run decides its result, and what may change when it goes on: the tables that `--resume` goes by."""

from __future__ import annotations

from collections.abc import Mapping

from phinetune.engine.peft_variants import changes_the_base
from phinetune.training.best_checkpoint import WATCHING
from phinetune.training.recorded import TRAIN_COUNT, TRAIN_ROWS, Record

# The one table of what may change without harm, by section: what is shown, kept, written or looked at, and how memory
# is used. Each gives the same adapter. `*` is every key of the section.
HARMLESS: Mapping[str, tuple[str, ...]] = {
    "model": ("path", "tokenizer", "adapter", "use_cache"),  # weights and tokenizer are compared by content
    "data": (
        # The rows that come of these are compared by content.
        *("train", "eval", "split", "format", "loss_on", "system", "overlong", "invalid_rows", "limit", "seed"),
        *(
            "test",
            "columns",
            "prompt",
            "completion",
            "system_text",
            "row",
            "text_by",
            "response",
            "instruction",
            "tag",
            "group",
            "train_share",
        ),
    ),
    # Recomputes the same numbers; and what becomes of a step that would have ended the run.
    "engine": ("activation_memory", "on_nonfinite", "nonfinite_limit"),
    "evaluation": ("*",),
    "training_config": (
        *("logging_strategy", "logging_steps", "logging_first_step", "logging_nan_inf_filter", "log_level"),
        *("log_level_replica", "log_on_each_node", "disable_tqdm", "report_to", "project", "trackio_space_id"),
        *("trackio_bucket_id", "trackio_static_space_id", "include_num_input_tokens_seen", "include_for_metrics"),
        *("save_strategy", "save_steps", "save_total_limit", "save_only_model", "save_on_each_node"),
        *("enable_jit_checkpoint", "restore_callback_states_from_checkpoint", "skip_memory_metrics", "debug"),
        *("push_to_hub", "hub_model_id", "hub_strategy", "hub_private_repo", "hub_always_push", "hub_revision"),
        *("eval_strategy", "eval_steps", "eval_delay", "eval_on_start", "per_device_eval_batch_size"),
        *("eval_accumulation_steps", "eval_do_concat_batches", "eval_use_gather_object", "prediction_loss_only"),
        *("batch_eval_metrics", "metric_for_best_model", "greater_is_better", "do_train", "do_eval", "do_predict"),
        *("dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers"),
        *("dataloader_prefetch_factor", "dataloader_multiprocessing_context", "dataset_num_proc"),
        *("gradient_checkpointing", "gradient_checkpointing_kwargs", "activation_checkpointing"),
        *("activation_checkpointing_kwargs", "activation_offloading", "torch_empty_cache_steps"),
        *("fsdp", "fsdp_config"),  # where the base lies; what is trained is whole in each process
        *("ddp_timeout", "ddp_backend", "ddp_bucket_cap_mb", "ddp_find_unused_parameters", "local_rank", "use_cpu"),
        "max_length",  # what it cuts shows in the rows, what it fills in data.packing
    ),
}
# Of these, what counts all the same where evaluations decide: which checkpoint is the best, or when the run stops.
COUNT_FOR_THE_BEST: Mapping[str, tuple[str, ...]] = {
    "evaluation": (
        *("early_stopping_patience", "early_stopping_threshold", "generate", "metrics", "max_prompts"),
        *("max_new_tokens", "rows_while_training"),
    ),
    "training_config": (
        *("eval_strategy", "eval_steps", "eval_delay", "eval_on_start", "save_strategy", "save_steps"),
        *("metric_for_best_model", "greater_is_better"),
    ),
}
# What even --changed does not take, with the reason.
OTHER_TENSORS = "the tensors in the checkpoint would not fit"
OTHER_STATE = "the optimizer's state in the checkpoint would not fit"
STREAM = "the next row of a stream can't be found with other rows or steps"
NEVER: Mapping[str, str] = {
    "data.streaming": STREAM,
    "training_config.optim": OTHER_STATE,
    "training_config.optim_target_modules": OTHER_STATE,
    "training_config.deepspeed": OTHER_STATE,
}
# Keys of `peft_config` that change no tensor's shape, and so can be taken.
SCALES = ("lora_alpha", "alpha_pattern", "use_rslora")
# What changes the sequence of the rows, what cuts it into other steps, and what the schedule follows.
ORDER = {
    *(TRAIN_ROWS, TRAIN_COUNT, "data.packing", "training_config.seed", "training_config.data_seed"),
    *("training_config.train_sampling_strategy", "training_config.accelerator_config"),
}
STEP_SIZE = {
    *("training_config.per_device_train_batch_size", "training_config.gradient_accumulation_steps"),
    *("processes.number", "training_config.dataloader_drop_last"),
}
SCHEDULE = {
    *("training_config.learning_rate", "training_config.lr_scheduler_type", "training_config.lr_scheduler_kwargs"),
    *("training_config.warmup_steps", "training_config.max_steps", "training_config.num_train_epochs"),
}


def is_harmless(key: str, *records: Record) -> bool:
    """Whether runs with these records give the same adapter, though they differ in `key`."""
    if not _in(HARMLESS, key) or (key == "data.row" and any(record.get("data.streaming") for record in records)):
        return False  # of a stream only the first rows are compared, so its function has to be the same
    return not (counts_for_the_best(key) and any(map(_evaluations_decide, records)))


def counts_for_the_best(key: str) -> bool:
    """Whether a key decides which evaluation is the best one."""
    return _in(COUNT_FOR_THE_BEST, key)


def _in(table: Mapping[str, tuple[str, ...]], key: str) -> bool:
    section, _, name = key.partition(".")
    return name in table.get(section, ()) or "*" in table.get(section, ())


def _evaluations_decide(record: Record) -> bool:
    """Whether evaluations decide the adapter: the best checkpoint, an early stop, or a schedule that follows them."""
    return bool(
        record.get("training_config.load_best_model_at_end")
        or record.get("evaluation.early_stopping_patience")
        or _follows_losses(record)
    )


def _follows_losses(record: Record) -> bool:
    return record.get("training_config.lr_scheduler_type") in WATCHING


def why_never(key: str, *records: Record) -> str | None:
    """Why a run can't go on with another value of `key`, not even knowingly; None if it can."""
    section, _, name = key.partition(".")
    if section == "peft_config" and name != "lora_dropout":
        begun = any(changes_the_base(record.get("peft_config.init_lora_weights")) for record in records)
        return OTHER_TENSORS if begun or name not in SCALES else None
    if key in SCHEDULE | STEP_SIZE and any(map(_follows_losses, records)):
        return "the schedule follows the losses that it has seen"
    if key in ORDER | STEP_SIZE and any(record.get("data.streaming") for record in records):
        return STREAM
    return NEVER.get(key)
