"""Keeps an answer to JSON, a JSON schema, or a tool call, by llguidance: tokens that would break it are never taken."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from phinetune.engine.continuous.requests import Constraint
from phinetune.serving.errors import ApiError

# Free white space would let a small model write nothing else for ever.
SPACING: Any = {"whitespace_flexible": False, "key_separator": ": ", "item_separator": ", "}


@dataclass(frozen=True)
class Calls:
    """The calls that an answer may be.

    Attributes:
        marks: what stands before and after a call.
        tools: the functions, of which one is called.
        listed: whether calls stand in a list.
    """

    marks: tuple[str, str]
    tools: Sequence[Mapping[str, Any]]
    listed: bool


class Grammars:
    """The grammars of one model's tokens."""

    def __init__(self, tokenizer: Any, vocabulary: int) -> None:
        """Make them. Takes about a second for a large vocabulary.

        Args:
            vocabulary: how many logits the model has.
        """
        from llguidance.hf import from_tokenizer

        self._tokens = from_tokenizer(tokenizer, n_vocab=vocabulary)

    def json(self, schema: Mapping[str, Any], param: str, calls: Calls | None = None) -> Callable[[], Constraint]:
        """What keeps an answer to a schema, or else to a call.

        Args:
            param: the parameter that the schema came in, for an error.
            calls: the calls that may stand in the answer's place.

        Raises:
            ApiError: the schema is none, or uses what can't be kept to.
        """
        from llguidance import LLMatcher

        try:
            grammar = LLMatcher.grammar_from_json_schema(json.dumps(schema), defaults=SPACING)
        except ValueError as error:
            raise _refused(str(error), param) from None
        answer = f"%json {json.dumps({**schema, 'x-guidance': SPACING})}\n"
        if calls is None:
            return self._maker(grammar, param, f"start: {answer}")
        self._maker(grammar, param, "")  # an error in the schema is told as the schema's
        lark = f"start: answer | call\nanswer: {answer}{self._call_rules(calls)}"
        return self._maker(LLMatcher.grammar_from_lark(lark), "tools", lark)

    def call(self, calls: Calls) -> Callable[[], Constraint]:
        """What keeps an answer to a call of one of the tools."""
        from llguidance import LLMatcher

        lark = f"start: call\n{self._call_rules(calls)}"
        return self._maker(LLMatcher.grammar_from_lark(lark), "tools", lark)

    def _call_rules(self, calls: Calls) -> str:
        """The rule `call` of a grammar, and the one that it needs."""
        forms = [
            {
                "type": "object",
                "properties": {
                    "name": {"const": tool["name"]},
                    "arguments": tool.get("parameters") or {"type": "object"},
                },
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
            for tool in calls.tools
        ]
        schema: dict[str, Any] = forms[0] if len(forms) == 1 else {"anyOf": forms}
        if calls.listed:
            schema = {"type": "array", "items": schema, "minItems": 1, "maxItems": 1}
        begin, end = map(self._in_lark, calls.marks)
        return f"call: {begin} json {end}\njson: %json {json.dumps({**schema, 'x-guidance': SPACING})}\n"

    def _in_lark(self, mark: str) -> str:
        """A mark in a grammar: special tokens stand by their own names there, and text in quotes."""
        ids = self._tokens.tokenize_str(mark) if mark else []
        return mark if len(ids) == 1 and self._tokens.is_special_token(ids[0]) else json.dumps(mark) if mark else ""

    def _maker(self, grammar: str, param: str, lark: str) -> Callable[[], Constraint]:
        from llguidance import LLMatcher

        matcher = LLMatcher(self._tokens, grammar, log_level=0)
        if matcher.is_error():
            raise _refused(matcher.get_error(), param)
        return _Maker(matcher, f"%llguidance {{}}\n{lark}")


def _refused(reason: str, param: str) -> ApiError:
    text = " ".join(reason.split())[:300]
    return ApiError(400, f"Invalid schema for '{param}': {text}", code="invalid_json_schema", param=param)


class _Maker:
    """Makes what keeps one answer to a grammar.

    Attributes:
        lark: the grammar as a text, in the form in which llama.cpp takes llguidance's.
    """

    def __init__(self, matcher: Any, lark: str) -> None:
        self._matcher, self.lark = matcher, lark

    def __call__(self) -> Constraint:
        return _Kept(self._matcher.deep_copy())


class _Kept:
    """One answer's place in its grammar; a `Constraint`."""

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher

    def mask_(self, logits: Tensor) -> None:
        mask = self._matcher.compute_bitmask()
        self._check()  # after an error the mask allows the end alone, which would cut the answer in silence
        bits = np.unpackbits(np.frombuffer(mask, dtype=np.uint8), bitorder="little")
        may = torch.zeros(len(logits), dtype=torch.bool)
        count = min(len(bits), len(logits))
        may[:count] = torch.from_numpy(bits[:count].copy()).bool()
        logits.masked_fill_(~may, -torch.inf)

    def take(self, token: int) -> bool:
        self._matcher.consume_token(token)
        self._check()
        return bool(self._matcher.is_stopped())

    def _check(self) -> None:
        if self._matcher.is_error():
            raise RuntimeError(f"the grammar can't be kept: {self._matcher.get_error()}")
