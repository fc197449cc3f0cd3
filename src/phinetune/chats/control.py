"""Tells control tokens that someone typed from the template's own. A typed `<|end|>` in a message is only letters.

First, the control tokens in a chat's messages are masked, before the template renders the chat. So the rendered text
tells the typed ones from the template's. Then the tokenizer's *twin* encodes such a text. The twin is the same
tokenizer, except that its control tokens have names that nobody can type. For the twin, typed control tokens are
ordinary letters. A chat without typed control tokens is not masked, and the tokenizer itself encodes it.

transformers' `sanitize_control_tokens` has the same purpose, but can't be used here. It returns only ids, while loss
masks also need the text. And it allows control tokens in no part of a message, while a Phi-4 mini tool call must
contain some. It also encodes a typed token separately from its neighbours. The twin encodes it together with them, as
any other letters.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from phinetune.errors import ModelError

NONCE = secrets.token_hex(8)  # part of every stand-in; new in each process, so no data file can contain a stand-in
THOUGHTS = frozenset({"<think>", "</think>"})  # reasoning checkpoints write these in their answers

_known: WeakKeyDictionary[PreTrainedTokenizerBase, ControlTokens] = WeakKeyDictionary()


def control_tokens(tokenizer: PreTrainedTokenizerBase) -> ControlTokens:
    """The tokenizer's control tokens. They are looked up once and then kept."""
    if tokenizer not in _known:
        _known[tokenizer] = ControlTokens(tokenizer)
    return _known[tokenizer]


class ControlTokens:
    """The control tokens of a tokenizer: its special tokens, and its other added tokens of the form `<|…|>`.

    The others count because Phi-4 mini declares its tool tokens as not special, and its template makes `<|tool|>` from
    a role.

    Attributes:
        ids: the token ids by text, the longest text first.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        added = {token.content: i for i, token in tokenizer.added_tokens_decoder.items() if _is_control(token)}
        self.ids: dict[str, int] = {text: added[text] for text in sorted(added, key=len, reverse=True)}
        self._texts = list(self.ids)
        self._typed = re.compile("|".join(map(re.escape, self._texts)) or "(?!)")
        # An anchor separates a text: the text before it and the text from it on have the same tokens as if each were
        # encoded alone.
        anchors = [text for text, i in self.ids.items() if not tokenizer.added_tokens_decoder[i].normalized]
        self._anchors = re.compile("|".join(map(re.escape, anchors)) or "(?!)")
        self._anchor_ids = {self.ids[text] for text in anchors}
        self._masked = re.compile(f"\ue000{NONCE}:(\\d+)\ue001")
        self._backend: Tokenizer | None = None
        backend = getattr(tokenizer, "backend_tokenizer", None)
        self._description: str | None = backend.to_str() if isinstance(backend, Tokenizer) else None

    def find(self, text: str) -> list[str]:
        """The control tokens that occur in `text`, in order."""
        return self._typed.findall(text)

    def anchors(self, text: str, ids: Sequence[int]) -> list[tuple[int, int, int]]:
        """Find the template's own control tokens in a rendered text and among its token ids.

        Returns:
            (start in the text, end in the text, place in `ids`) of each. Empty if text and ids do not agree.
        """
        found = list(self._anchors.finditer(text))
        places = [place for place, i in enumerate(ids) if i in self._anchor_ids]
        if [self.ids[match[0]] for match in found] != [ids[place] for place in places]:
            return []
        return [(*match.span(), place) for match, place in zip(found, places, strict=True)]

    def mask(self, value: Any, spared: frozenset[str] = frozenset()) -> Any:
        """Replace the control tokens in `value` by stand-ins.

        Args:
            value: text, or lists and dictionaries of text. Keys of dictionaries are masked too.
            spared: control tokens that are not replaced.
        """
        if isinstance(value, str):
            return self._typed.sub(lambda m: m[0] if m[0] in spared else self._stand_in(m[0]), value)
        if isinstance(value, Mapping):
            return {self.mask(key, spared): self.mask(item, spared) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.mask(item, spared) for item in value]
        return value

    def unmask(self, text: str) -> str:
        """The text, with the typed control tokens again in place of their stand-ins."""
        return self._masked.sub(lambda m: self._texts[int(m[1])], text)

    @staticmethod
    def is_masked(text: str) -> bool:
        """Whether a text contains stand-ins."""
        return NONCE in text

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """The token ids of masked texts. Masked control tokens become letters, unmasked ones become control tokens.

        Raises:
            ModelError: the tokenizer has no twin, see `_twin`.
        """
        named = [self.unmask(self._typed.sub(lambda m: _twin_name(self.ids[m[0]]), text)) for text in texts]
        return [encoding.ids for encoding in self._twin.encode_batch(named, add_special_tokens=False)]

    def offsets(self, text: str) -> list[tuple[int, int]]:
        """(start, end) of each token in a text, if every control token in it is taken as letters."""
        return list(self._twin.encode(text, add_special_tokens=False).offsets)

    def _stand_in(self, token: str) -> str:
        """The letters that replace a control token: private-use characters around the nonce and a number."""
        return f"\ue000{NONCE}:{self._texts.index(token)}\ue001"

    @cached_property
    def _twin(self) -> Tokenizer:
        """The tokenizer with renamed control tokens. Ids and everything else are the same.

        Raises:
            ModelError: the tokenizer is not one of the `tokenizers` library, or its ids would change.
        """
        if self._description is None:
            raise ModelError(
                "a message contains a control token as text; this tokenizer is not of the `tokenizers` library, so the "
                "control token can't be told from the template's own; remove the control tokens from the data"
            )
        twin = Tokenizer.from_str(json.dumps(_renamed(json.loads(self._description), self.ids)))
        moved = [text for text, i in self.ids.items() if twin.token_to_id(_twin_name(i)) != i]
        if moved:
            raise ModelError(
                f"this tokenizer's control tokens can't be renamed: {', '.join(moved)} would get other ids"
            )
        return twin


def _is_control(token: Any) -> bool:
    return bool(token.special) or (token.content.startswith("<|") and token.content.endswith("|>"))


def _twin_name(token_id: int) -> str:
    return f"\ue002{NONCE}:{token_id}\ue003"


def _renamed(tree: dict[str, Any], ids: Mapping[str, int]) -> dict[str, Any]:
    """A tokenizer's description, as in tokenizer.json, with renamed control tokens."""
    names = {text: _twin_name(i) for text, i in ids.items()}
    for token in tree["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    model = tree["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {names.get(text, text): i for text, i in model["vocab"].items()}
    else:  # a Unigram model has pairs of text and score
        model["vocab"] = [[names.get(text, text), score] for text, score in model["vocab"]]
    if model.get("unk_token"):
        model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
    return {**tree, "post_processor": None, "truncation": None, "padding": None}
