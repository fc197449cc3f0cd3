"""A previewed row on the terminal, token by token."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

from phinetune.data.preview import PreviewedRow, TokenText, Turn
from phinetune.terminal_text import printable, visible

COLOURS = {"system": "magenta", "user": "cyan", "assistant": "green", "tool": "yellow"}
COLOURS |= {"chosen": "green", "good": "green", "rejected": "red", "not good": "red"}
SHOWN = 400  # tokens of a turn that are shown; the middle of a longer one is left out
MARGIN = 10
INDENT = " " * MARGIN + " │ "


def needs_marks(console: Console) -> bool:
    """Whether signs have to stand where colours can't."""
    return console.no_color or not console.is_terminal


def show_row(row: PreviewedRow, console: Console, *, boundaries: bool = False) -> None:
    """Print a row: tokens coloured by role, trained ones underlined, special ones reversed, and where it is cut.

    Without colours, ⟦ ⟧ stand around what is trained on and « » around special tokens.

    Args:
        boundaries: set a ¦ between tokens.
    """
    if row.broken:
        broken = (("broken", "red"), f": {printable(row.problem or '')}\n")
        console.print(Text.assemble((printable(row.where), "bold"), " · ", *broken), soft_wrap=True)
        return
    console.print(_heading(row), soft_wrap=True)
    for turn in row.turns:
        console.print(_lines(turn, needs_marks(console), boundaries), soft_wrap=True)
    console.print()


def _heading(row: PreviewedRow) -> Text:
    text = Text(printable(row.where), style="bold")
    text.append(f" · {row.form or 'no known form'}", style="not bold")
    if row.problem is None:
        tokens = f"{row.tokens:,} tokens, {row.trainable:,} of them trained on"
        pieces = f" · the first of {row.pieces:,} pieces" if row.pieces > 1 else ""
        text.append(f" · {tokens}{' · cut to fit' if row.cut else ''}{pieces}", style="not bold")
        if row.unused:
            text.append(f" · not used: {printable(', '.join(row.unused))}", style="not bold")
    else:
        text.append(f" · dropped: {printable(row.problem)}", style="red not bold")
    return text


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
