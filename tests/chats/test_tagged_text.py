"""Texts with tags of their own: which of their tokens are answers, and what a prompt of them is."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from phinetune.chats.encoder import make_encoder
from phinetune.chats.tagged_text import PLAIN, ResponseTags
from phinetune.checkpoints.load import Loaded
from phinetune.engine.examples import IGNORED
from phinetune.errors import RowError

TAGS = ResponseTags("### Response:", "### Instruction:")
ONE = "### Instruction:\nAdd 2 and 2.\n### Response:\nIt is 4."
TWO = f"{ONE}\n### Instruction:\nAnd 3?\n### Response: It is ### Response: 7.</s>"


def trained(
    tokenizer: PreTrainedTokenizerBase, text: str, tags: ResponseTags | None, loss_on: str = "assistant"
) -> Any:
    """The trained parts of a text, each as its own text, and the tokens before the first one."""
    (row,) = make_encoder(tokenizer, loss_on, tags=tags).encode_texts([text])
    parts: list[list[int]] = [[]]
    for token, label in zip(row.input_ids, row.labels, strict=True):
        assert label in (token, IGNORED)
        if label != IGNORED:
            parts[-1].append(token)
        elif parts[-1]:
            parts.append([])
    return [str(tokenizer.decode(part)).strip() for part in parts if part], row


@pytest.mark.parametrize("kind", ["phi3", "tiny"])
def test_answers_alone_are_trained_on(kind: str, tiny: Loaded, request: pytest.FixtureRequest) -> None:
    tokenizer = request.getfixturevalue("phi3_tokenizer") if kind == "phi3" else tiny.tokenizer
    eos = str(tokenizer.eos_token)
    last = ResponseTags(TAGS.response)
    assert trained(tokenizer, ONE, TAGS)[0] == [f"It is 4.{eos}"]
    both = TWO.replace("</s>", eos)
    assert trained(tokenizer, both, TAGS)[0] == ["It is 4.", f"It is ### Response: 7.{eos}"]
    assert trained(tokenizer, both, TAGS, "last")[0] == [f"It is ### Response: 7.{eos}"]
    assert trained(tokenizer, both, last)[0] == [f"7.{eos}"]
    assert trained(tokenizer, ONE, TAGS, "all")[1].labels == trained(tokenizer, ONE, None)[1].labels
    assert IGNORED not in trained(tokenizer, ONE, None)[1].labels


@pytest.mark.parametrize("kind", ["phi3", "tiny"])
def test_a_prompt_is_made_of_the_tokens_before_the_answer(
    kind: str, tiny: Loaded, request: pytest.FixtureRequest
) -> None:
    """So a model answers where it learned to; the line end behind the tag belongs to the prompt."""
    tokenizer = request.getfixturevalue("phi3_tokenizer") if kind == "phi3" else tiny.tokenizer
    encoder = make_encoder(tokenizer, tags=TAGS)
    for text in (ONE, ONE.replace("### Response:\n", "### Response: ")):
        prompt, answer = encoder.asked(text + str(tokenizer.eos_token))
        assert answer == {"role": "assistant", "content": "It is 4."}
        assert prompt == {"role": PLAIN, "content": text[: -len("It is 4.")].rstrip(" ")}
        (row,) = encoder.encode_texts([text])
        asked = next(i for i, label in enumerate(row.labels) if label != IGNORED)
        assert encoder.prompt_ids([prompt]) == row.input_ids[:asked]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("Add 2 and 2. It is 4.", "the text does not hold '### Response:'"),
        ("### Response:\n \n", "nothing stands behind the last '### Response:'"),
        (f"{ONE}\n### Instruction: And?\n### Response:", "nothing stands behind the last"),
    ],
)
def test_a_text_without_an_answer_is_refused(text: str, told: str) -> None:
    with pytest.raises(RowError, match=told) as refused:
        TAGS.spans(text)
    assert refused.value.kind == "response"


def test_a_fixed_prompt_ends_where_an_answer_begins() -> None:
    assert TAGS.prompt("### Instruction: Hi\n### Response:\n") is not None
    assert TAGS.prompt("### Instruction: Hi") is None
    assert TAGS.prompt(ONE) is None
