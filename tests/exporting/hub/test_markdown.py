"""Names and data put nothing into a card but their text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from markdown_it import MarkdownIt

from phinetune.config.run import load_config
from phinetune.exporting.hub.card import write_card
from phinetune.exporting.hub.markdown import code, fenced, plain
from phinetune.exporting.hub.merged_card import write_merged_card

ATTACKS = [
    "<script>alert(1)</script>",
    "[click](http://evil.example)",
    "![x](http://evil.example/p.png)",
    "x\n---\nlicense: mit\n---\n# Title",
    "a`b``c",
    "``` \n<b>",
    "a|b|c",
    "http://evil.example",
    "&lt;b&gt;",
    "**bold** _it_ # h",
    "\x1b[31m\u202ex",
    "`",
    "joe@evil.example",
]


def html(text: str) -> str:
    return MarkdownIt("gfm-like", {"linkify": False}).render(text)


@pytest.mark.parametrize("text", ATTACKS)
def test_text_is_read_as_it_stands(text: str) -> None:
    for made in (f"# {plain(text)}\n", f"x {code(text)} y\n", fenced("yaml", text)):
        page = html(made)
        for tag in ("<script", "<a ", "<img", "<b>", "<hr", "<strong", "<em", "<h2", "\x1b", "\u202e"):
            assert tag not in page, (made, page)
    assert html(code(text)).count("<code>") == 1
    assert html(fenced("yaml", text)).count("<pre>") == 1


@pytest.mark.parametrize("text", ATTACKS)
def test_a_card_holds_no_more_than_its_own_parts(text: str, tiny_run: Path) -> None:
    results = json.loads((tiny_run / "results.json").read_text())
    wanted = html(write_card(load_config(tiny_run / "config.yaml"), results, {"target_modules": {"qkv_proj"}}))
    results["base"]["path"] = text
    results["data"]["train"]["source"] = text
    config = load_config(tiny_run / "config.yaml")
    config.model.path = config.data.train = text
    card = write_card(config, results, {"target_modules": {text}}, repo=text)
    found = html(card)
    assert yaml.safe_load(card.split("---\n")[1])["library_name"] == "peft"
    for tag in ("<script", "<a ", "<img", "<strong", "<em", "<hr", "<h1", "<h2", "<h3", "<pre", "<table", "<tr", "<td"):
        assert found.count(tag) == wanted.count(tag), tag


def test_a_merged_card_and_a_token(tiny_run: Path) -> None:
    record = {
        "base": {"path": "<img src=x>", "revision": "", "fingerprint": ""},
        "base_weights": "16-bit",
        "adapter": {"path": "a`<b>hf_" + "a1B" * 11},
        "dtype": "bfloat16",
    }
    text = write_merged_card("<b>name", record)
    assert "(secret)" in text
    assert "a1B" not in text
    assert "<img" not in html(text)
    assert "<b>" not in html(text)
