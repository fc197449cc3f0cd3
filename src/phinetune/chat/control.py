"""Control tokens that someone typed: `<|end|>` in a message is letters; only the template's own `<|end|>` is a token.

What a chat's messages hold is masked before the template renders it, so the rendered text tells the two apart. Such
a text is encoded by the tokenizer's *twin*, whose control tokens go by names that nobody can type: there the typed
ones are ordinary letters. A chat without typed control tokens goes neither way, so its ids are the tokenizer's own.

transformers' `sanitize_control_tokens` does the same work and can't be used here: it returns ids only, where loss masks
need texts too, and it lets no part of a message hold control tokens, as a Phi-4 mini tool call must. It encodes a
typed token apart from its neighbours; the twin encodes it among them, as it does any other letters.
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

NONCE = secrets.token_hex(8)  # new in every process, so no data file can hold a stand-in
THOUGHTS = frozenset({"<think>", "</think>"})  # reasoning checkpoints write these themselves, in their answers

_known: WeakKeyDictionary[PreTrainedTokenizerBase, ControlTokens] = WeakKeyDictionary()


def control_tokens(tokenizer: PreTrainedTokenizerBase) -> ControlTokens:
    """The tokenizer's control tokens, looked up once."""
    if tokenizer not in _known:
        _known[tokenizer] = ControlTokens(tokenizer)
    return _known[tokenizer]


class ControlTokens:
    """The special tokens of a tokenizer and its other added tokens of the form `<|…|>`.

    Phi-4 mini declares its tool tokens as not special, and its template builds `<|tool|>` from a role.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        added = {token.content: i for i, token in tokenizer.added_tokens_decoder.items() if _is_control(token)}
        self.ids: dict[str, int] = {text: added[text] for text in sorted(added, key=len, reverse=True)}
        self._texts = list(self.ids)
        self._typed = re.compile("|".join(map(re.escape, self._texts)) or "(?!)")
        # Where one of these stands, a text's tokens before it and from it on are those of the two parts alone.
        anchors = [text for text, i in self.ids.items() if not tokenizer.added_tokens_decoder[i].normalized]
        self._anchors = re.compile("|".join(map(re.escape, anchors)) or "(?!)")
        self._anchor_ids = {self.ids[text] for text in anchors}
        self._masked = re.compile(f"\ue000{NONCE}:(\\d+)\ue001")
        self._backend: Tokenizer | None = None
        backend = getattr(tokenizer, "backend_tokenizer", None)
        self._description: str | None = backend.to_str() if isinstance(backend, Tokenizer) else None

    def find(self, text: str) -> list[str]:
        """The control tokens written in `text`, in order."""
        return self._typed.findall(text)

    def anchors(self, text: str, ids: Sequence[int]) -> list[tuple[int, int, int]]:
        """Where the template's own control tokens stand in a rendered text and among its token ids.

        Returns:
            (first letter, letter behind the last, place in `ids`) of each; nothing where the two do not agree.
        """
        found = list(self._anchors.finditer(text))
        places = [place for place, i in enumerate(ids) if i in self._anchor_ids]
        if [self.ids[match[0]] for match in found] != [ids[place] for place in places]:
            return []
        return [(*match.span(), place) for match, place in zip(found, places, strict=True)]

    def mask(self, value: Any, spared: frozenset[str] = frozenset()) -> Any:
        """`value` (text, or lists and dicts of it, keys too) with stand-ins for the control tokens in it."""
        if isinstance(value, str):
            return self._typed.sub(lambda m: m[0] if m[0] in spared else self._stand_in(m[0]), value)
        if isinstance(value, Mapping):
            return {self.mask(key, spared): self.mask(item, spared) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.mask(item, spared) for item in value]
        return value

    def unmask(self, text: str) -> str:
        """The text with what was typed in place of the stand-ins."""
        return self._masked.sub(lambda m: self._texts[int(m[1])], text)

    @staticmethod
    def is_masked(text: str) -> bool:
        return NONCE in text

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of masked texts: control tokens that stand there unmasked are tokens, the masked ones letters."""
        named = [self.unmask(self._typed.sub(lambda m: _twin_name(self.ids[m[0]]), text)) for text in texts]
        return [encoding.ids for encoding in self._twin.encode_batch(named, add_special_tokens=False)]

    def offsets(self, text: str) -> list[tuple[int, int]]:
        """Where each token of a text begins and ends if every control token in it is letters."""
        return list(self._twin.encode(text, add_special_tokens=False).offsets)

    def _stand_in(self, token: str) -> str:
        return f"\ue000{NONCE}:{self._texts.index(token)}\ue001"

    @cached_property
    def _twin(self) -> Tokenizer:
        """The tokenizer with its control tokens renamed, ids and all else kept.

        Raises:
            ModelError: a tokenizer that is not one of the `tokenizers` library, or whose ids would change.
        """
        if self._description is None:
            raise ModelError(
                "a message holds a control token as text, and with this tokenizer (not of the `tokenizers` library) it "
                "can't be told from the template's own; take the control tokens out of the data"
            )
        twin = Tokenizer.from_str(json.dumps(_renamed(json.loads(self._description), self.ids)))
        moved = [text for text, i in self.ids.items() if twin.token_to_id(_twin_name(i)) != i]
        if moved:
            raise ModelError(f"this tokenizer's control tokens can't be renamed: {', '.join(moved)} would move")
        return twin


def _is_control(token: Any) -> bool:
    return bool(token.special) or (token.content.startswith("<|") and token.content.endswith("|>"))


def _twin_name(token_id: int) -> str:
    return f"\ue002{NONCE}:{token_id}\ue003"


def _renamed(tree: dict[str, Any], ids: Mapping[str, int]) -> dict[str, Any]:
    """The description of a tokenizer (tokenizer.json) with control tokens renamed."""
    names = {text: _twin_name(i) for text, i in ids.items()}
    for token in tree["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    model = tree["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {names.get(text, text): i for text, i in model["vocab"].items()}
    else:  # Unigram: pairs of text and score
        model["vocab"] = [[names.get(text, text), score] for text, score in model["vocab"]]
    if model.get("unk_token"):
        model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
    return {**tree, "post_processor": None, "truncation": None, "padding": None}
