"""The card of a run holds what a reader of the hub needs."""

from __future__ import annotations

from pathlib import Path

import yaml


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


def test_a_base_on_the_hub_is_named_in_the_front_matter(tiny_run: Path) -> None:
    import json

    from phinetune.config.run import load_config
    from phinetune.exporting.hub.card import write_card

    results = json.loads((tiny_run / "results.json").read_text())
    results["base"] |= {"path": "microsoft/Phi-3-mini-4k-instruct", "revision": "abc"}
    del results["evaluation"]
    text = write_card(load_config(tiny_run / "config.yaml"), results, {"target_modules": {"qkv_proj"}})
    assert "base_model: microsoft/Phi-3-mini-4k-instruct" in text
    assert "(revision `abc`)" in text
    assert "Not measured." in text
