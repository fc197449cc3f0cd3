"""The model card of a run: what it is, what it was trained on, how good it is, how to use it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from phinetune.config import RunConfig
from phinetune.measures import measured


def write_card(config: RunConfig, results: Mapping[str, Any], lora: Mapping[str, Any]) -> str:
    """The card's Markdown, with the front matter that the hub reads.

    Args:
        results: as in results.json: `base`, `data`, `training` and, where it was measured, `evaluation`.
        lora: the adapter's configuration in force.
    """
    base = results["base"]
    name = config.output_dir.resolve().name
    revision = f" (revision `{base['revision']}`)" if base["revision"] else ""
    parts = [
        _front_matter(base["path"]),
        f"# {name}\n\nA LoRA adapter for `{base['path']}`{revision}, trained with phinetune.",
        "## Data\n\n" + "\n".join(f"- {line}" for line in _data_lines(results["data"])),
        "## Training\n\n" + _training_lines(results["training"]),
        "## Results on held-out chats\n\n" + _results_table(results.get("evaluation")),
        "## Use\n\n" + _usage(config, base["path"]),
        "## Settings\n\n```yaml\n" + _settings(config, lora) + "```",
    ]
    return "\n\n".join(parts) + "\n"


def _front_matter(base: str) -> str:
    matter: dict[str, Any] = {
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["lora", "phi3", "phinetune"],
    }
    if "/" in base and not base.startswith((".", "/", "~")):
        matter["base_model"] = base
    return f"---\n{yaml.safe_dump(matter, sort_keys=False)}---"


def _data_lines(data: Mapping[str, Any]) -> Sequence[str]:
    return [
        f"{part.replace('_', ' ')}: `{report['source']}`, {report['kept']} of {report['rows']} chats, "
        f"{report['tokens']:,} tokens, {report['trainable_tokens']:,} of them trained on or scored"
        for part, report in data.items()
        if report
    ]


def _training_lines(training: Mapping[str, Any]) -> str:
    speed = f" ({training['tokens_per_s']:.0f} tokens/s)" if training["tokens_per_s"] else ""
    return (
        f"{training['steps']} steps, {training['epochs']:.2f} epochs, {training['tokens']:,} tokens in "
        f"{training['seconds']:.0f} s{speed}; {training['trainable_parameters']:,} trainable parameters."
    )


def _results_table(evaluation: Mapping[str, Any] | None) -> str:
    if not evaluation:
        return "Not measured."
    lines = ["| | " + " | ".join(evaluation) + " |", "|---|" + "---:|" * len(evaluation)]
    for measure in measured(evaluation):
        values = [measure.amount(side[measure.key]) for side in evaluation.values()]
        lines.append(f"| {measure.heading} | " + " | ".join(values) + " |")
    return "\n".join(lines)


def _usage(config: RunConfig, base: str) -> str:
    folder = config.output_dir
    return (
        f"```sh\nphinetune chat {folder}\n```\n\nor with transformers and PEFT"
        f"{' (the base is in this machine’s cache)' if base == 'starter' else ''}:\n\n"
        "```python\nfrom peft import AutoPeftModelForCausalLM\nfrom transformers import AutoTokenizer\n\n"
        f'model = AutoPeftModelForCausalLM.from_pretrained("{folder}")\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{folder}")\n```'
    )


def _settings(config: RunConfig, lora: Mapping[str, Any]) -> str:
    shown = {
        "model": config.model.model_dump(mode="json"),
        "peft_config": {**config.peft_config, "target_modules": sorted(lora["target_modules"])},
        "training_config": config.training_config,
    }
    return str(yaml.safe_dump(shown, sort_keys=False, allow_unicode=True))
