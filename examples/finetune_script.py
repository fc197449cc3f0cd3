"""The short script: LoRA on ShareGPT conversations, the settings of the cookbook's FineTrainingScript.py.

Shows ShareGPT rows (`conversations` with `from` and `value`), gradient accumulation and checkpointing, a linear
schedule, `paged_adamw_32bit`, a checkpoint each epoch, and the comparison with the base model.

Needs phinetune and nothing else; the data is in examples/data. Takes about three minutes on two CPU cores (the
starter, 135 million weights, is made once before that).

    python examples/finetune_script.py
    python examples/finetune_script.py --model microsoft/Phi-3-mini-4k-instruct    # on a GPU
"""

from __future__ import annotations

import argparse
from pathlib import Path

from phinetune import train

DATA = Path(__file__).resolve().parent / "data"

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="starter", help="hub id, folder or `starter`")
parser.add_argument("--output-dir", default="runs/finetune_script", help="where the run goes")
parser.add_argument("--rows", type=int, default=84, help="train on the first N of the 240 conversations")
options = parser.parse_args()

peft_config = {
    "r": 16,
    "lora_alpha": 32,
    "lora_dropout": 0.05,
    "target_modules": "all-linear",
}

training_config = {
    "output_dir": options.output_dir,
    "num_train_epochs": 3,
    "per_device_train_batch_size": 7,
    "gradient_accumulation_steps": 4,  # a step is 28 conversations
    "gradient_checkpointing": True,  # phinetune recomputes no more than the free memory asks for
    # bitsandbytes' optimizer, whose state moves out of a GPU that is full. Without bitsandbytes it is torch's AdamW,
    # which takes the same steps, and a line says so.
    "optim": "paged_adamw_32bit",
    "learning_rate": 1e-4,
    "lr_scheduler_type": "linear",
    "logging_steps": 10,
    "save_strategy": "epoch",
    "seed": 0,
}

run = train(
    model=options.model,
    data={
        "train": str(DATA / "shop_sharegpt_train.jsonl"),
        "eval": str(DATA / "shop_sharegpt_heldout.jsonl"),
        "limit": options.rows,
    },
    peft_config=peft_config,
    training_config=training_config,
    evaluation={"generate": False},  # the loss alone; `True` lets both models answer as well
)

base, tuned = run.results["evaluation"]["base"], run.results["evaluation"]["tuned"]
checkpoints = sorted(run.path.glob("checkpoint-*"))
assert tuned["loss"] < base["loss"], "the held-out conversations became likelier"
assert len(checkpoints) == 3, "one checkpoint an epoch"
assert (run.path / "adapter_model.safetensors").is_file()
print(f"All as said: held-out loss {base['loss']:.2f} before, {tuned['loss']:.2f} after; {run.path} holds the adapter")
