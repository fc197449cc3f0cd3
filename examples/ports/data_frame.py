"""Tickets in a data frame, sorted into topics: macro-F1 and a confusion matrix."""

import pandas

from phinetune import train

run = train(
    "microsoft/Phi-3-mini-4k-instruct",
    {"train": pandas.read_csv("tickets.csv"), "eval": 0.5, "columns": {"user": "subject", "assistant": "topic"}},
    training_config={"output_dir": "runs/tickets", "num_train_epochs": 1},
    evaluation={"metrics": [{"name": "topic", "classes": ["billing", "delivery", "returns"]}], "max_new_tokens": 8},
)
