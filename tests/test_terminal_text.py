"""Text of strangers is text on a terminal."""

from __future__ import annotations

import pytest

from phinetune.terminal_text import printable, visible

ATTACKS = {
    "a colour": "\x1b[31mred",
    "the screen cleared": "\x1b[2J\x1b[H",
    "a title": "\x1b]0;title\x07",
    "a link": "\x1b]8;;http://evil.example\x1b\\ok\x1b]8;;\x1b\\",
    "the clipboard": "\x1b]52;c;ZXZpbA==\x07",
    "a line written over": "bad.jsonl\rgood.jsonl",
    "letters taken back": "bad\x08\x08\x08good",
    "an 8-bit escape": "\x9b31mred",
    "a bell": "\x07",
    "letters deleted": "x\x7f",
    "text turned round": "\u202egnp.exe",
    "an isolate": "\u2066x\u2069",
    "letters that can't be seen": "a\u200bb\ufeff",
    "tags that can't be seen": "a\U000e0041",
    "half a letter": "a\ud800",
    "a line separator": "a\u2028b",
    "a form feed": "a\x0cb\x0bc",
}


@pytest.mark.parametrize("text", [pytest.param(text, id=name) for name, text in ATTACKS.items()])
def test_nothing_acts_on_the_terminal(text: str) -> None:
    for shown in (visible(text), printable(text)):
        assert shown.isprintable()
        assert len(shown) == len(text)


def test_escapes_can_be_read() -> None:
    assert visible("\x1b[31m\r\x7f\u202e") == "␛[31m␍␡�"
    assert printable("\x1b[31m\n") == "�[31m�"


def test_what_is_harmless_stays() -> None:
    text = "Zürich 日本 👨\u200d👩\u200d👧 می\u200cخواهم a\u00a0b\u3000c"
    assert visible(text) == text
    assert visible("a\nb\tc") == "a\nb␉c"
    assert visible("a\nb\tc", "\n\t") == "a\nb\tc"
    assert printable("👨\u200d👩") == "👨\u200d👩"
