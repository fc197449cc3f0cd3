"""A conversation on the terminal."""

from __future__ import annotations

from collections.abc import Callable

from rich.console import Console

from phinetune.errors import PhinetuneError
from phinetune.talk.conversation import Conversation

HELP = "/reset starts anew, /base switches between tuned and base model, /help shows this, /exit or Ctrl-D leaves"


def hold_chat(conversation: Conversation, console: Console, read: Callable[[str], str] = input) -> None:
    """Read messages and stream answers until the user leaves. Ctrl-C stops an answer, not the chat."""
    console.print(HELP, style="dim", highlight=False)
    while True:
        try:
            message = read("you> ").strip()
        except (EOFError, KeyboardInterrupt):
            console.print()
            return
        if message in ("/exit", "/quit"):
            return
        if message.startswith("/"):
            console.print(_command(conversation, message), style="dim", highlight=False)
        elif message:
            _show_answer(conversation, message, console)


def _command(conversation: Conversation, message: str) -> str:
    if message == "/reset":
        conversation.reset()
        return "a new conversation"
    if message == "/base":
        if not conversation.opened.has_adapter:
            return "this is a model without an adapter: it is the base"
        conversation.with_base = not conversation.with_base
        name = "base" if conversation.with_base else "tuned"
        seen = "; it sees what was said so far, and /reset starts anew" if conversation.turns else ""
        return f"now talking to the {name} model{seen}"
    return HELP if message == "/help" else f"no such command: {message}; {HELP}"


def _show_answer(conversation: Conversation, message: str, console: Console) -> None:
    name = "base" if conversation.with_base or not conversation.opened.has_adapter else "tuned"
    console.print(f"{name}> ", end="", style="bold green", highlight=False)
    pieces = conversation.stream(message)
    try:
        for piece in pieces:
            console.print(piece, end="", markup=False, highlight=False, soft_wrap=True)
    except KeyboardInterrupt:
        pieces.close()  # type: ignore[attr-defined]
        console.print(" (stopped)", style="dim", end="")
    except PhinetuneError as error:  # a message that is too long; the chat goes on
        console.print(str(error), style="red", markup=False, highlight=False, end="")
    console.print()
