"""`phinetune data preview`: a row as the model will see it, token by token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from rich.console import Console
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from phinetune.chat.encoder import ChatEncoder, Encoded
from phinetune.chat.template import Message, common_prefix, render, tokenize
from phinetune.data.prepare.encode_rows import RowOutcome
from phinetune.data.read.rows import Broken
from phinetune.data.visible import printable, visible
from phinetune.engine.scoring import IGNORED

COLOURS = {"system": "magenta", "user": "cyan", "assistant": "green", "tool": "yellow"}
SHOWN = 400  # tokens of a turn that are shown; the middle of a longer one is left out
MARGIN = 10
INDENT = " " * MARGIN + " │ "
_ANCHOR = "a"  # a letter before a token, so that decoding does not take the token for a text's beginning


class TokenText(NamedTuple):
    """Tokens that make whole characters together: one, or the several that a rare character takes."""

    text: str
    special: bool
    trained: bool


class Turn(NamedTuple):
    """The tokens of one turn, and a remark that belongs behind it."""

    role: str
    pieces: list[TokenText]
    remark: str = ""


def show_row(found: RowOutcome | Broken, encoder: ChatEncoder, console: Console, *, boundaries: bool = False) -> None:
    """Print a row: tokens coloured by role, trained ones underlined, special ones reversed, and where it is cut.

    Without colours, ⟦ ⟧ stand around what is trained on and « » around special tokens.

    Args:
        boundaries: set a ¦ between tokens.
    """
    if isinstance(found, Broken):
        console.print(
            f"[bold]{_safe(found.where)}[/] · [red]broken[/]: {_safe(found.problem)}\n", highlight=False, soft_wrap=True
        )
        return
    console.print(_heading(found), soft_wrap=True)
    if found.encoded:
        marks = console.no_color or not console.is_terminal
        for turn in turns_of(found, encoder):
            console.print(_lines(turn, marks, boundaries), soft_wrap=True)
    console.print()


def _safe(text: str) -> str:
    return printable(text).replace("[", "\\[")


def _heading(outcome: RowOutcome) -> Text:
    text = Text(printable(outcome.row.where), style="bold")
    text.append(f" · {outcome.form or 'no known form'}", style="not bold")
    if outcome.encoded:
        tokens = f"{len(outcome.encoded.input_ids):,} tokens, {outcome.encoded.trainable:,} of them trained on"
        text.append(f" · {tokens}{' · cut to fit' if outcome.cut else ''}", style="not bold")
    else:
        text.append(f" · dropped: {printable(outcome.reason or '')}", style="red not bold")
    return text


def turns_of(outcome: RowOutcome, encoder: ChatEncoder) -> list[Turn]:
    """The row's tokens turn by turn, with remarks where a cut left something out."""
    row = outcome.encoded or Encoded([], [])
    chat = outcome.fitted or outcome.chat
    if not chat:
        return [Turn(outcome.form or "row", list(pieces(encoder.tokenizer, row)))]
    remarks = _remarks(outcome.chat, chat) if outcome.cut else {}
    ends = turn_ends(encoder.tokenizer, chat, row.input_ids)
    turns = [Turn("", [], remarks[-1])] if -1 in remarks else []
    for i, (start, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
        part = Encoded(row.input_ids[start:end], row.labels[start:end])
        turns.append(Turn(chat[i]["role"], list(pieces(encoder.tokenizer, part)), remarks.get(i, "")))
    return turns


def turn_ends(tokenizer: PreTrainedTokenizerBase, chat: Sequence[Message], ids: Sequence[int]) -> list[int]:
    """Where each turn's tokens end; a header that announces a turn belongs to it."""
    ends: list[int] = []
    for i in range(1, len(chat)):
        try:
            part = tokenize(tokenizer, [render(tokenizer, chat[:i])])[0]
            ends.append(max([*ends[-1:], common_prefix(part, ids)]))
        except Exception:  # a template that refuses half a chat raises whatever it likes: the turns stay together
            ends.append(ends[-1] if ends else 0)
    return [*ends, len(ids)]


def _remarks(whole: Sequence[Message], left: Sequence[Message]) -> dict[int, str]:
    """What a cut left out, by the turn behind which it stood (-1: before the first)."""
    head = int(left[0]["role"] == "system" and whole[0]["role"] == "system")
    gone = len(whole) - len(left)
    remarks = {head - 1: f"✂ {gone} turn{'s' if gone > 1 else ''} left out to fit"} if gone else {}
    for i in range(head, len(left)):
        short = len(whole[i + gone]["content"]) - len(left[i]["content"])
        if short:
            remarks[i] = f"✂ the last {short:,} characters of this turn cut to fit"
    return remarks


def pieces(tokenizer: PreTrainedTokenizerBase, row: Encoded) -> Iterator[TokenText]:
    """The tokens as text, each by itself; those of one character that takes several together."""
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    anchor = tokenizer(_ANCHOR, add_special_tokens=False)["input_ids"]
    before = len(str(tokenizer.decode(anchor)))
    waiting: list[int] = []
    for place, token in enumerate(row.input_ids):
        trained = row.labels[place] != IGNORED
        if token in special:
            yield TokenText(str(tokenizer.convert_ids_to_tokens(token)), True, trained)
            continue
        waiting.append(token)
        text = str(tokenizer.decode([*anchor, *waiting]))[before:]
        following = row.input_ids[place + 1] if place + 1 < len(row.input_ids) else None
        if "\ufffd" in text and len(waiting) < 4 and following is not None and following not in special:
            continue
        yield TokenText(text, False, trained)
        waiting = []


def _lines(turn: Turn, marks: bool, boundaries: bool) -> Text:
    """A turn behind its role: a margin on the left, the tokens' own line breaks shown and kept."""
    text = Text(f"{turn.role:>{MARGIN}} │ " if turn.pieces else "", style="dim")
    open_mark = False
    for i, piece in enumerate(_shortened(turn.pieces)):
        if open_mark and not piece.trained:
            text.append("⟧", style="not dim")
        if boundaries and i:
            _append(text, "¦", "dim")
        if marks and piece.trained and not open_mark:
            _append(text, "⟦", "not dim")
        open_mark = marks and piece.trained
        shown = f"«{piece.text}»" if piece.special and marks else piece.text
        underline = " underline" if piece.trained else ""
        reverse = " reverse" if piece.special else ""
        _append(text, visible(shown), f"not dim {COLOURS.get(turn.role, 'white')}{underline}{reverse}")
    if open_mark:
        text.append("⟧", style="not dim")
    if turn.remark:
        text.append(("\n" if turn.pieces else "") + f"{INDENT}{turn.remark}", style="not dim red")
    return text


def _append(text: Text, shown: str, style: str) -> None:
    """Append; a line break shows as a sign, and what comes after it stands behind the margin."""
    for i, line in enumerate(shown.split("\n")):
        for part in ("↵" if i else "", line):
            if part:
                if text.plain.endswith("↵"):
                    text.append(f"\n{INDENT}", style="dim")
                text.append(part, style=style)


def _shortened(all_pieces: Sequence[TokenText]) -> list[TokenText]:
    if len(all_pieces) <= SHOWN:
        return list(all_pieces)
    middle = all_pieces[SHOWN // 2 : -SHOWN // 2]
    gap = TokenText(f" … {len(middle):,} more … ", False, middle[0].trained)
    return [*all_pieces[: SHOWN // 2], gap, *all_pieces[-SHOWN // 2 :]]
