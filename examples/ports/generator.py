"""Rows from a generator, made chats by a function, measured by a function over all answers."""

from phinetune import train

rows = ({"n": n, "double": 2 * n} for n in range(48))
train(
    "microsoft/Phi-3-mini-4k-instruct",
    {"train": rows, "eval": 0.25, "row": lambda r: {"prompt": f"Double {r['n']}.", "completion": str(r["double"])}},
    training_config={"output_dir": "runs/doubles", "num_train_epochs": 1},
    evaluation={"metrics": [{"name": "kinds", "compute": lambda answers, _: len(set(answers))}], "max_new_tokens": 8},
)
