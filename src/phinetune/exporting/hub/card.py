"""The model card of a run: its base, its data, its results and how to use it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from phinetune.config.run import SECRETS, RunConfig
from phinetune.data.prepare.report import replay_sentence
from phinetune.data.prepare.shared_rows import shared_sentences
from phinetune.evaluation.trust import few_answers, few_rows
from phinetune.exporting.hub.card_usage import adapter_usage
from phinetune.exporting.hub.markdown import code, fenced, plain
from phinetune.metric_table import LESS_TOLD, measured
from phinetune.run_folder import told_changes
from phinetune.secret_text import tree_without_secrets


def write_card(
    config: RunConfig, results: Mapping[str, Any], lora: Mapping[str, Any], *, repo: str | None = None
) -> str:
    """The card as Markdown, with the front matter that the hub reads.

    Args:
        results: as in results.json: `base` and, if they are known, `data`, `training` and `evaluation`.
        lora: PEFT's configuration of the adapter, defaults filled in.
        repo: the repository that the card is for; None if it is for the run's folder on this machine.
    """
    base = results["base"]
    name = repo or config.output_dir.resolve().name
    parts = [
        front_matter("peft", ["lora", "phi3", "phinetune"], base),
        f"# {plain(name)}\n\nA LoRA adapter for {described_base(base)}, trained with phinetune.",
        *training_sections(results),
        "## Use\n\n" + adapter_usage(hub_id(base), base["path"], repo, config.output_dir),
        settings_section(config, lora),
    ]
    return "\n\n".join(parts) + "\n"


def front_matter(library: str, tags: Sequence[str], base: Mapping[str, Any], relation: str | None = None) -> str:
    """The front matter, which the hub reads. It names the base if the base is on the hub."""
    matter: dict[str, Any] = {"library_name": library, "pipeline_tag": "text-generation", "tags": list(tags)}
    if hub_id(base):
        matter |= {"base_model": base["path"]} | ({"base_model_relation": relation} if relation else {})
    return f"---\n{yaml.safe_dump(matter, sort_keys=False)}---"


def hub_id(base: Mapping[str, Any]) -> str | None:
    """The id of a base on the hub; None for a base that is not there.

    A base with a revision is on the hub. Other tools record no revision; for theirs, a name of the form `owner/name`
    is an id if there is no such folder.
    """
    path = str(base["path"])
    is_id = base["revision"] or (re.fullmatch(r"\w[\w.-]*/[\w.-]+", path) and not Path(path).exists())
    return path if is_id else None


def described_base(base: Mapping[str, Any]) -> str:
    """The base and its revision, in Markdown."""
    return code(base["path"]) + (f" (revision {code(base['revision'])})" if base["revision"] else "")


def training_sections(results: Mapping[str, Any]) -> list[str]:
    """The sections on data, training and results on held-out or test chats. What is not known is left out."""
    parts = []
    if results.get("data"):
        parts.append("## Data\n\n" + "\n".join(f"- {line}" for line in _data_lines(results["data"])))
    if results.get("training"):
        measured_on = "test chats" if (results.get("data") or {}).get("test") else "held-out chats"
        parts.append("## Training\n\n" + _training_lines(results["training"], results.get("curves") or []))
        parts.append(f"## Results on {measured_on}\n\n" + _results_table(results))
    if results.get("kept"):
        parts.append("## Kept of the base\n\n" + plain(results["kept"]["text"]))
    return parts


def _data_lines(data: Mapping[str, Any]) -> Sequence[str]:
    sets = [
        f"{part.replace('_', ' ')}: {code(report['source'])}, {report['kept']} of {report['rows']} chats, "
        f"{report['tokens']:,} tokens, {report['trainable_tokens']:,} of them trained on or scored"
        for part in ("train", "held_out", "test")
        if (report := data.get(part))
    ]
    unlooked = [data["not_compared"]] if data.get("not_compared") else []
    sets += [replay_sentence(data["replay"])] if data.get("replay") else []
    return [*sets, *map(plain, [*shared_sentences(data.get("overlap") or {}), *unlooked])]


def _training_lines(training: Mapping[str, Any], curves: Sequence[Mapping[str, str]]) -> str:
    speed = f" ({training['tokens_per_s']:.0f} tokens/s)" if training["tokens_per_s"] else ""
    return (
        f"{training['steps']} steps, {training['epochs']:.2f} epochs, {training['tokens']:,} tokens in "
        f"{training['seconds']:.0f} s{speed}; {training['trainable_parameters']:,} trainable parameters."
        + "".join(f"\n\n{plain(sentence)}" for sentence in told_changes(training.get("changed")))
        # A spike shows rows of the data, which a card does not publish.
        + "".join(f"\n\n{plain(one['text'])}" for one in curves if one["kind"] != "spike")
    )


def _results_table(results: Mapping[str, Any]) -> str:
    evaluation = results.get("evaluation")
    if not evaluation:
        return "Not measured."
    lines = ["| | " + " | ".join(map(plain, evaluation)) + " |", "|---|" + "---:|" * len(evaluation)]
    for measure in measured(evaluation, results.get("own")):
        values = [measure.amount(side[measure.key]) for side in evaluation.values()]
        lines.append(f"| {plain(measure.titled)} | " + " | ".join(values) + " |")
    judged = [f"\n{plain(one['text'])} (model {code(one['model'])})." for one in (results.get("judged") or {}).values()]
    found = [f"{plain(key.replace('_', ' '))} {one['text']}" for key, one in (results.get("differences") or {}).items()]
    changed = [f"\nTuned beside base: {'; '.join(found)}."] if found else []
    few = [f"\n{plain(sentence)}." for sentence in _few(results.get("data") or {}, evaluation)]
    return "\n".join([*lines, "", f"{LESS_TOLD}.", *changed, *few, *judged])


def _few(data: Mapping[str, Any], evaluation: Mapping[str, Any]) -> list[str]:
    """How little few rows and answers tell. The other flags of a comparison may hold texts and tags of the data."""
    rows = (data.get("test") or data.get("held_out") or {}).get("kept")
    prompts = min((side["prompts"] for side in evaluation.values()), default=0)
    return [] if rows is None else [*few_rows(rows), *few_answers(rows, prompts)]


def settings_section(config: RunConfig, lora: Mapping[str, Any]) -> str:
    """The card's section with the settings of model, objective, adapter and training.

    Target modules have the model's own names.
    """
    targets = lora["target_modules"]
    shown = {
        "model": config.model.model_dump(mode="json"),
        "objective": config.objective.model_dump(mode="json"),
        "peft_config": {
            **(config.peft_config or {"r": lora["r"], "lora_alpha": lora["lora_alpha"]}),
            "target_modules": targets if isinstance(targets, str) else sorted(targets),
        },
        "training_config": {key: value for key, value in config.training_config.items() if key not in SECRETS},
    }
    text = yaml.safe_dump(tree_without_secrets(shown), sort_keys=False, allow_unicode=True)
    return "## Settings\n\n" + fenced("yaml", text)
