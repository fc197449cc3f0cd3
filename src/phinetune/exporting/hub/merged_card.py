"""The model card of a merged model: what it is made of, its held-out losses and how to use it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from phinetune.checkpoints.starter import REQUIREMENT
from phinetune.exporting.hub.card import described_base, front_matter
from phinetune.exporting.hub.card_usage import merged_usage
from phinetune.exporting.hub.markdown import code, plain
from phinetune.exporting.merge.merged import OWN_NF4, SIXTEEN_BIT

MEANING = {
    "base": "the base alone, as the adapter was trained on it",
    "adapter": "base and adapter, as trained",
    "merged": "this model, as written",
}


def write_merged_card(
    name: str, record: Mapping[str, Any], *, repo: str | None = None, training: Sequence[str] = (), settings: str = ""
) -> str:
    """The card as Markdown, with the front matter that the hub reads.

    Args:
        name: the model's name.
        record: as in merged.json: `base`, `base_weights`, `adapter`, `dtype` and, if measured, `held_out_loss`.
        repo: the repository that the card is for; None if it is for a folder called `name`.
        training, settings: sections from the card of the run that was merged.
    """
    parts = [
        front_matter("transformers", ["phi3", "phinetune", "merged"], record["base"], "finetune"),
        f"# {plain(repo or name)}\n\n{_what_it_is(record)}",
        *([] if training else ["## Held-out loss\n\n" + _losses(record.get("held_out_loss"))]),
        *training,
        "## Use\n\n" + merged_usage(repo, name),
        *([settings] if settings else []),
    ]
    return "\n\n".join(parts) + "\n"


def _what_it_is(record: Mapping[str, Any]) -> str:
    base, weights = record["base"], record["base_weights"]
    quantised = {SIXTEEN_BIT: "", OWN_NF4: ", whose nf4 weights were turned back first"}.get(
        weights, f", whose weights were quantised to {weights} and turned back first"
    )
    origin = f" The starter is SmolLM2-135M-Instruct ({REQUIREMENT})." if base["path"] == "starter" else ""
    return (
        f"A Phi-3 in {record['dtype']}: {described_base(base)}{quantised}, with the LoRA adapter "
        f"{code(record['adapter']['path'])} merged into it by phinetune.{origin} It runs without an adapter; do not "
        "load that adapter on it again."
    )


def _losses(losses: Mapping[str, float] | None) -> str:
    if not losses:
        return "Not measured."
    lines = ["| | nats per labelled token | |", "|---|---:|---|"]
    return "\n".join([*lines, *(f"| {side} | {loss:.4f} | {MEANING[side]} |" for side, loss in losses.items())])
