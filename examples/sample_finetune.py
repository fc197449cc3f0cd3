"""The model card's sample, for one process or several: two dictionaries, logging, packing, evaluation, saving.

The counterpart of sample_finetune.py beside microsoft/Phi-3-mini-4k-instruct. Its two dictionaries stand here as they
stand there: keys that the libraries have retired since (`overwrite_output_dir`, `warmup_ratio`) are translated or left
out, and a line says so.

Shows the guide's second half: hyper-parameters, loading, chat template, training by several processes, evaluation,
saving. Needs phinetune and nothing else; the data is in examples/data. Takes about three minutes on two CPU cores.

    python examples/sample_finetune.py                                                # one process
    accelerate launch --multi_gpu --num_processes 2 examples/sample_finetune.py       # two; without a GPU on the CPU
    accelerate launch --num_processes 8 examples/sample_finetune.py --model microsoft/Phi-3-mini-4k-instruct

Where there is no GPU, accelerate (1.15) starts several processes only when told `--multi_gpu`; with `--cpu` it starts
one, whatever `--num_processes` says. `torchrun --nproc-per-node 2 examples/sample_finetune.py` does the same.

A step of two processes is that of one with twice the batch: the gradients are averaged over all trained tokens. The
first process alone prints and writes.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from phinetune import train

DATA = Path(__file__).resolve().parent / "data"

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="starter", help="hub id, folder or `starter`")
parser.add_argument("--output-dir", help="where the run goes, in place of training_config's")
parser.add_argument("--rows", type=int, help="train on the first N conversations")
options = parser.parse_args()

###################
# Hyper-parameters
###################
training_config = {
    "bf16": True,
    "do_eval": False,
    "learning_rate": 5.0e-06,
    "log_level": "info",
    "logging_steps": 20,
    "logging_strategy": "steps",
    "lr_scheduler_type": "cosine",
    "num_train_epochs": 1,
    "max_steps": -1,
    "output_dir": "./checkpoint_dir",
    "overwrite_output_dir": True,
    "per_device_eval_batch_size": 4,
    "per_device_train_batch_size": 4,
    "remove_unused_columns": True,
    "save_steps": 100,
    "save_total_limit": 1,
    "seed": 0,
    "gradient_checkpointing": True,
    "gradient_checkpointing_kwargs": {"use_reentrant": False},
    "gradient_accumulation_steps": 1,
    "warmup_ratio": 0.2,
}

peft_config = {
    "r": 16,
    "lora_alpha": 32,
    "lora_dropout": 0.05,
    "bias": "none",
    "task_type": "CAUSAL_LM",
    "target_modules": "all-linear",
    "modules_to_save": None,
}

# What the sample hands to SFTTrainer beside them.
packing = {"packing": True, "max_length": 2048}

# The sample trains on 200,000 conversations, on a GPU. The 240 here fill eleven rows of 2,048 tokens, so a step takes
# one row and learns faster; without `bf16` the precision is that of the weights. Leave this out for data of your own.
small = {"per_device_train_batch_size": 1, "learning_rate": 5.0e-04, "bf16": None}

###############
# Setup logging
###############
logging.basicConfig(
    format="%(asctime)s - %(levelname)s - %(name)s - %(message)s",
    datefmt="%Y-%m-%d %H:%M:%S",
    handlers=[logging.StreamHandler(sys.stdout)],
)

################
# Model loading
################
# The keywords that the sample gives from_pretrained. Only transformers' own classes are used, so there is no remote
# code to trust.
model = {
    "path": options.model,
    "use_cache": False,
    "attn_implementation": "sdpa",  # "flash_attention_2" on a GPU that has it
    "torch_dtype": "auto",  # bfloat16 where the processor multiplies it, as all newer GPUs do; else float32
    "device_map": None,
}

##################
# Data processing
##################
# The checkpoint's own chat template renders `messages`. The loss falls on the answers; "all" trains on the prompts
# as well, as the sample does.
data = {
    "train": str(DATA / "shop_messages_train.jsonl"),
    "eval": str(DATA / "shop_messages_heldout.jsonl"),
    "loss_on": "all",
    "limit": options.rows,
}

###########
# Training
###########
if options.output_dir:
    training_config["output_dir"] = options.output_dir
run = train(
    model=model,
    data=data,
    peft_config=peft_config,
    training_config={**training_config, **packing, **small},
    evaluation={"generate": False},
    overwrite=training_config["overwrite_output_dir"],
)

#############
# Evaluation
#############
# Every process gets the results; they were measured, printed and written by the first.
base, tuned = run.results["evaluation"]["base"], run.results["evaluation"]["tuned"]
assert run.results["training"]["steps"] >= 1
assert tuned["loss"] < base["loss"], "the held-out conversations became likelier"
logging.getLogger("phinetune.sample").info(
    "All as said: held-out loss %.4f before, %.4f after; %s holds the adapter", base["loss"], tuned["loss"], run.path
)

# ############
# # Save model
# ############
# It is saved: `phinetune chat checkpoint_dir` talks to it, `phinetune merge checkpoint_dir --out merged` makes a plain
# transformers model of it.
