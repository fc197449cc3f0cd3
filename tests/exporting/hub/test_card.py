"""The card of a run holds what a reader of the hub needs."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

from phinetune.config.run import load_config
from phinetune.exporting.hub.card import write_card


def test_the_card_has_front_matter_data_results_and_settings(tiny_run: Path) -> None:
    text = (tiny_run / "README.md").read_text()
    _, front, body = text.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["lora", "phi3", "phinetune"],
    }
    assert "9 of 9 chats" in body
    assert "3 of 3 chats" in body
    assert "| | base | tuned |" in body
    assert "| exact match % |" in body
    settings = yaml.safe_load(body.split("```yaml\n")[1].split("```")[0])
    assert settings["peft_config"]["r"] == 4
    assert settings["training_config"]["max_steps"] == 6


def test_the_card_has_intervals_and_says_how_little_few_rows_tell_and_no_text_of_the_data(tiny_run: Path) -> None:
    results = json.loads((tiny_run / "results.json").read_text())
    results["flags"].append("of tag 'a customer', tuned: evaluation.metrics: `mine` failed on 'my secret row'")
    text = write_card(load_config(tiny_run / "config.yaml"), results, {"target_modules": {"qkv_proj"}})
    assert "Tuned beside base: loss " in text
    assert "95% interval" in text
    assert text.count("only 3 held-out chats") == 1
    assert "a customer" not in text
    assert "my secret row" not in text


def test_a_base_on_the_hub_is_named_in_the_front_matter(tiny_run: Path) -> None:
    results = json.loads((tiny_run / "results.json").read_text())
    results["base"] |= {"path": "microsoft/Phi-3-mini-4k-instruct", "revision": "abc"}
    del results["evaluation"]
    text = write_card(load_config(tiny_run / "config.yaml"), results, {"target_modules": {"qkv_proj"}})
    assert "base_model: microsoft/Phi-3-mini-4k-instruct" in text
    assert "(revision `abc`)" in text
    assert "Not measured." in text
