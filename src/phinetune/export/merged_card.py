"""The README of a merged model: what it is, how good it is, how to run it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from phinetune.model.starter import REQUIREMENT

MEANING = {
    "base": "the base alone, as the adapter was trained on it",
    "adapter": "base and adapter, as trained",
    "merged": "this model, as written",
}


def write_merged_card(name: str, record: Mapping[str, Any]) -> str:
    """The Markdown, with the front matter that the hub reads.

    Args:
        name: the model's.
        record: as in merged.json: `base`, `base_weights`, `adapter`, `dtype` and, where measured, `held_out_loss`.
    """
    parts = [
        _front_matter(record["base"]["path"]),
        f"# {name}\n\n{_what_it_is(record)}",
        "## Held-out loss\n\n" + _losses(record.get("held_out_loss")),
        "## Use\n\n" + _usage(),
    ]
    return "\n\n".join(parts) + "\n"


def _front_matter(base: str) -> str:
    matter: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["phi3", "phinetune", "merged"],
    }
    if "/" in base and not base.startswith((".", "/", "~")):
        matter["base_model"] = base
        matter["base_model_relation"] = "finetune"
    return f"---\n{yaml.safe_dump(matter, sort_keys=False)}---"


def _what_it_is(record: Mapping[str, Any]) -> str:
    base, weights = record["base"], record["base_weights"]
    revision = f" (revision `{base['revision']}`)" if base["revision"] else ""
    started = "" if weights == "16bit" else f", whose weights were quantised to {weights} and turned back first"
    origin = f" The starter is SmolLM2-135M-Instruct ({REQUIREMENT})." if base["path"] == "starter" else ""
    return (
        f"A Phi-3 in {record['dtype']}: `{base['path']}`{revision}{started}, with the LoRA adapter "
        f"`{record['adapter']['path']}` merged into it by phinetune.{origin} It runs without any adapter; that one "
        "must not be put on it again."
    )


def _losses(losses: Mapping[str, float] | None) -> str:
    if not losses:
        return "Not measured."
    lines = ["| | nats a labelled token | |", "|---|---:|---|"]
    return "\n".join([*lines, *(f"| {side} | {loss:.4f} | {MEANING[side]} |" for side, loss in losses.items())])


def _usage() -> str:
    return (
        "In this folder:\n\n"
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'model = AutoModelForCausalLM.from_pretrained(".", dtype="auto")\n'
        'tokenizer = AutoTokenizer.from_pretrained(".")\n'
        'chat = [{"role": "user", "content": "Hello"}]\n'
        'inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", '
        "return_dict=True)\n"
        "answer = model.generate(**inputs, max_new_tokens=256)\n"
        'print(tokenizer.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))\n```'
    )
