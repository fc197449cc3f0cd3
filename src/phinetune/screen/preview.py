"""A chat as the model sees it: every token, the trained ones told apart."""

from __future__ import annotations

from rich.text import Text
from transformers import PreTrainedTokenizerBase

from phinetune.chat.encoder import Encoded
from phinetune.data.visible import visible
from phinetune.engine.scoring import IGNORED

SHOWN = 700  # characters of a preview


def preview(tokenizer: PreTrainedTokenizerBase, row: Encoded, marks: bool = False) -> Text:
    """The decoded tokens in order, trained spans in bold green, the rest dim; long rows are shortened.

    Args:
        marks: put ⟦ ⟧ around trained spans, for where there are no colours.
    """
    text = Text()
    start = 0
    for end in range(1, len(row.input_ids) + 1):
        trained = row.labels[start] != IGNORED
        if end == len(row.input_ids) or (row.labels[end] != IGNORED) != trained:
            span = visible(str(tokenizer.decode(row.input_ids[start:end])))
            text.append(f"⟦{span}⟧" if trained and marks else span, style="bold green" if trained else "dim")
            start = end
    if len(text) > SHOWN:
        text = text[: SHOWN // 2] + Text(" … ", style="red") + text[-SHOWN // 2 :]
    return text
