"""What became of a run's rows, and the first chats as the model sees them."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from phinetune.data.prepare.chat_sets import Chats
from phinetune.data.prepare.report import replay_sentence
from phinetune.data.prepare.shared_rows import shared_sentences
from phinetune.engine.examples import IGNORED, Encoded
from phinetune.screen.console import say
from phinetune.terminal_text import visible

SHOWN = 700  # characters of a preview
PREVIEWS = 3


def show_data(chats: Chats, tokenizer: PreTrainedTokenizerBase, console: Console) -> None:
    """The reports of the sets, and the first chats with the trained part told apart."""
    for made in filter(None, (chats.train, chats.held_out, chats.test)):
        say(console, made.report.lines())
    if chats.replay:
        say(console, replay_sentence(chats.replay))
    for made in filter(None, (chats.held_out, chats.test)):
        if made.shared and (found := shared_sentences(made.shared.to_dict())):
            say(console, found)
        if made.not_compared:
            say(console, made.not_compared)
    marks = not console.is_terminal
    part = "the part in ⟦ ⟧" if marks else "the green part"
    console.print(f"The first chats as the model sees them; {part} is trained on:", highlight=False)
    for row in chats.train.encoded[:PREVIEWS]:
        console.print(preview(tokenizer, row, marks), highlight=False)


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
