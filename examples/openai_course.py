"""Fine-tuning by OpenAI's API, as courses teach it, against `phinetune serve` in place of OpenAI's service.

Shows the whole way with the official client, unmodified: chats as JSONL, `files.create`, `fine_tuning.jobs.create` with
epochs, seed and suffix, `list_events`, `retrieve` until the job has ended, then the tuned model's answers to chats that
it has not seen, counted by exact match as `phinetune demo` counts them.

Needs `pip install openai 'phinetune[serve]'`. With the starter it takes four minutes on two CPU cores with AVX2,
and six with all 420 chats.

    phinetune serve                       # in one terminal; it prints the two lines for the other one
    export OPENAI_BASE_URL=http://127.0.0.1:8686/v1
    export OPENAI_API_KEY=sk-phinetune-…
    python examples/openai_course.py
"""

from __future__ import annotations

import argparse
import json
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.resources import files
from io import BytesIO
from typing import Any

from openai import OpenAI

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="starter", help="a base model that the server offers")
parser.add_argument("--rows", type=int, default=220, help="train on the first N of the demo's 420 chats")
parser.add_argument("--held-out", type=int, default=80, help="ask the first N of its 80 held-out chats")
parser.add_argument("--epochs", type=int, default=1)
parser.add_argument("--batch-size", type=int, default=4)
parser.add_argument(
    "--multiplier", type=float, default=1.0, help="factor of the learning rate that the server's rule gives"
)
options = parser.parse_args()


def bundled(name: str, count: int) -> list[list[Any]]:
    """Chats of the demo with customers of a shop, each the messages up to the last answer, which is the shop's."""
    lines = files("phinetune.demo_data").joinpath(f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["messages"] for line in lines[:count]]


def as_jsonl(chats: list[list[Any]]) -> BytesIO:
    """One chat a line, as the API wants them."""
    return BytesIO("".join(json.dumps({"messages": chat}) + "\n" for chat in chats).encode())


def exact(client: OpenAI, model: str, chats: list[list[Any]]) -> float:
    """How many last answers are the shop's, letter for letter, in percent. Eight are asked for at a time."""

    def is_right(chat: list[Any]) -> bool:
        answer = client.chat.completions.create(model=model, messages=chat[:-1], temperature=0, max_tokens=80)
        return (answer.choices[0].message.content or "").strip() == chat[-1]["content"].strip()

    with ThreadPoolExecutor(8) as pool:
        return 100 * sum(pool.map(is_right, chats)) / len(chats)


def wait_for(client: OpenAI, job: str) -> Any:
    """Show a job's events as they come, until it has ended."""
    seen: set[str] = set()
    while True:
        found = client.fine_tuning.jobs.retrieve(job)
        for event in reversed(client.fine_tuning.jobs.list_events(fine_tuning_job_id=job, limit=100).data):
            if event.id not in seen:
                seen.add(event.id)
                print(f"  {event.message}")
        if found.status in ("succeeded", "failed", "cancelled"):
            return found
        time.sleep(1)


began = time.monotonic()
client = OpenAI()
train_rows, held_out = bundled("train", options.rows), bundled("heldout", options.held_out)
file = client.files.create(file=("chats.jsonl", as_jsonl(train_rows)), purpose="fine-tune")
print(f"{file.id}: {len(train_rows)} chats, {time.monotonic() - began:.0f} s")

job = client.fine_tuning.jobs.create(
    model=options.model,
    training_file=file.id,
    hyperparameters={
        "n_epochs": options.epochs,
        "batch_size": options.batch_size,
        "learning_rate_multiplier": options.multiplier,
    },
    seed=42,
    suffix="trailhead",
)
print(f"{job.id}: {job.status}")
done = wait_for(client, job.id)
if done.status != "succeeded":
    raise SystemExit(f"The job {done.status}: {done.error}")
tuned = time.monotonic() - began
print(f"{done.fine_tuned_model}: {done.trained_tokens:,} tokens trained, {tuned:.0f} s since the beginning")

print(client.chat.completions.create(
    model=done.fine_tuned_model, messages=held_out[0][:-1], temperature=0, max_tokens=80
).choices[0].message.content)  # fmt: skip
rate = exact(client, done.fine_tuned_model, held_out)
base = exact(client, options.model, held_out[:8])
print(f"exact match on {len(held_out)} chats: {rate:.1f}% (base, on {len(held_out[:8])} of them: {base:.1f}%)")
print(f"All as said: uploaded, tuned and asked in {time.monotonic() - began:.0f} s")
