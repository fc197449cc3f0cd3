"""Renders chats as transformers' `apply_chat_template` does, to the letter, in a sandbox with limits."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any

from jinja2 import Template, nodes
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.utils import Namespace
from transformers import PreTrainedTokenizerBase

from phinetune.chats.template_budget import EXCESS, Budget, weigh
from phinetune.chats.template_sandbox import LimitedEnvironment

LONGEST = 200_000  # letters of a template's source; the longest published ones have some 20,000
LONGEST_DATE = 200  # letters of a format of dates
# Names under which the reasoning of a message is passed, as transformers looks for them. Templates read the first;
# gpt-oss' reads the second.
REASONING = ("reasoning_content", "thinking", "reasoning")


def apply_template(
    tokenizer: PreTrainedTokenizerBase,
    chats: Sequence[Sequence[Mapping[str, Any]]],
    *,
    tools: list[Any] | None = None,
    reply: bool = False,
) -> list[str]:
    """The text of each chat: what `tokenizer.apply_chat_template(…, tokenize=False)` gives.

    Args:
        tools: JSON schemas of the functions that the model may call.
        reply: whether the text ends with the header of the assistant's next turn.

    Raises:
        TemplateError: the template has a fault, refuses a chat, or goes beyond the limits.
    """
    # Each thread has its own, as a budget belongs to one chat at a time.
    template = _compiled(tokenizer.get_chat_template(tools=tools), threading.get_ident())
    schemas = None if tools is None else _plain(tools)
    values = {
        "tools": schemas,
        "documents": None,
        **_plain(tokenizer.special_tokens_map),
        "add_generation_prompt": reply,
    }
    letters = 0 if schemas is None else weigh(schemas)
    return [
        _render(template, [_message(one) for one in chat], letters, values | {"add_generation_prompt": reply})
        for chat in chats
    ]


def _render(template: Template, messages: list[dict[str, Any]], letters: int, values: dict[str, Any]) -> str:
    """The text of one chat, piece by piece, so that it ends where the budget does."""
    if not messages:
        raise ValueError("the chat has no message")
    budget: Budget = template.environment.budget  # type: ignore[attr-defined]
    budget.refill(letters + sum(weigh(one) for message in messages for one in message.values()), len(messages))
    pieces, left = [], budget.letters
    try:
        for piece in template.root_render_func(template.new_context(values | {"messages": messages})):
            pieces.append(piece)
            left -= len(piece)
            if left < 0:
                raise SecurityError(EXCESS)
    except (MemoryError, RecursionError) as error:
        raise SecurityError(f"it goes beyond the limits of a chat template ({type(error).__name__})") from None
    except (TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
        raise TemplateError(f"{type(error).__name__}: {error}") from None
    return "".join(pieces)


def _message(given: Mapping[str, Any]) -> dict[str, Any]:
    message = {key: _plain(value) for key, value in given.items() if value is not None}
    reasoning = next((message[key] for key in REASONING if message.get(key) is not None), None)
    return message if reasoning is None else {"thinking": reasoning, **message, REASONING[0]: reasoning}


def _plain(value: Any) -> Any:
    """`value` of JSON's types only: a template may call the methods of what it sees. Others are replaced by a name."""
    kind = type(value)
    if kind is str or value is None or kind in (int, float, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, Mapping):
        return {_plain(key): _plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    return f"<{kind.__name__}>"


@lru_cache(maxsize=32)
def _compiled(source: str, thread: int) -> Template:
    """The template for a thread.

    Raises:
        TemplateError: it is too long, or no Jinja.
    """
    if len(source) > LONGEST:
        raise SecurityError(f"it has {len(source):,} letters, and a chat template has at most {LONGEST:,}")
    environment = LimitedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    environment.filters["tojson"] = environment.limited("tojson", _to_json)
    environment.globals |= {
        "raise_exception": _raise,
        "strftime_now": _now,
        "dict": _Dictionary(),
        "namespace": _Namespace,
    }
    try:
        template = environment.from_string(source)
    except (RecursionError, MemoryError, SyntaxError, ValueError) as error:
        raise SecurityError(f"it can't be compiled ({type(error).__name__}); it may be nested too deeply") from None
    template.globals = dict(template.globals)  # every chat copies it, and Jinja's chain of dictionaries is slow to copy
    return template


class _Generation(Extension):
    """The tag `generation`, which templates set around answers. Here it only stands for what is in it."""

    tags = {"generation"}  # noqa: RUF012 (Jinja declares it so)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_whole"), [], [], body).set_lineno(line)

    def _whole(self, caller: Callable[[], str]) -> str:
        return caller()


class _Dictionary:
    """`dict` for templates, without its attributes."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Namespace(Namespace):
    """Jinja's namespace without names that begin with an underscore, as they could reach Python's inside."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # `self` may be a name of the template's
        self, *given = args
        values = dict(*given, **kwargs)
        for name in values:
            _check_name(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)

    def __repr__(self) -> str:
        return "<namespace>"  # Jinja's own writes all that is in it


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"it stores {name!r} in a namespace; names with an underscore first are not allowed")


def _raise(message: str) -> None:
    raise TemplateError(message)


def _now(format: str) -> str:
    if len(format) > LONGEST_DATE:
        raise SecurityError(f"it asks for the date in a format of {len(format):,} letters")
    return datetime.now().strftime(format)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
