"""Text of tokens as they come: together what the tokenizer makes of all of them; ends and calls are held back."""

from __future__ import annotations

import random
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from helpers import SHARED
from phinetune.checkpoints.random_shapes import byte_tokenizer
from phinetune.serving.answers.texts import AnswerText, Decoder, TokenTexts

TEXT = "Grüße, 你好! It's 🙂 fine — as\n\n  it  was. def f(x):\n\treturn x  # ½"


@pytest.fixture(params=["bytes", "phi3"])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    if request.param == "bytes":
        return byte_tokenizer()
    if not (SHARED / "phi3-tokenizer").is_dir():
        pytest.skip("Phi-3's tokenizer is not there")
    return PreTrainedTokenizerFast.from_pretrained(SHARED / "phi3-tokenizer")


def test_pieces_are_the_whole(tokenizer: Any) -> None:
    """Of a text, and of random tokens, broken signs and special tokens among them."""
    draw = random.Random(4)
    rows = [tokenizer(TEXT)["input_ids"]]
    rows += [[draw.randrange(3, len(tokenizer)) for _ in range(40)] for _ in range(20)]
    for ids in rows:
        decoder = Decoder(tokenizer)
        pieces = [decoder.add(id) for id in ids]
        assert "".join(pieces) + decoder.rest() == tokenizer.decode(ids, skip_special_tokens=True)
    assert all("\ufffd" not in piece for piece in pieces[:-1] if len(rows) == 1)


def test_single_tokens_have_their_bytes(tokenizer: Any) -> None:
    texts = TokenTexts(tokenizer)
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    told = [texts(id) for id in ids]
    assert bytes(byte for _, raw in told for byte in raw).decode().strip() == TEXT
    assert any(name.startswith("bytes:\\x") for name, _ in told)


def made(text: str, **options: Any) -> tuple[list[str], AnswerText]:
    tokenizer = byte_tokenizer()
    answer = AnswerText(Decoder(tokenizer), **options)
    pieces = [answer.add(id) for id in tokenizer(text)["input_ids"]]
    return [*pieces, answer.finish()], answer


def test_a_stop_is_never_shown() -> None:
    pieces, answer = made("one two STOPS three", stops=["STOP", "never"])
    assert "".join(pieces) == "one two "
    assert answer.stopped
    pieces, answer = made("one ST two STO", stops=["STOP"])
    assert "".join(pieces) == "one ST two STO"  # what only began like it comes all the same
    assert not answer.stopped


def test_a_call_is_kept_apart() -> None:
    pieces, answer = made('I look. <call>{"name": 1}</call>', mark="<call>")
    assert ("".join(pieces), answer.calls) == ("I look. ", '<call>{"name": 1}</call>')
    pieces, answer = made(' {"name": 1}', bare=True)
    assert ("".join(pieces), answer.calls.strip()) == (" ", '{"name": 1}')
    pieces, answer = made("a {brace}", bare=True)
    assert ("".join(pieces), answer.calls) == ("a {brace}", "")
