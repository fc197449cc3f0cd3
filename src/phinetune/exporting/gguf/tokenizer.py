"""A tokenizer as GGUF keys for llama.cpp: tokens, their types, scores or merges, special ids, the chat template.

llama.cpp has two tokenizers for this family.

- `llama` is sentencepiece's. It merges the pair whose token has the highest score, so the file needs Phi-3's scores.
  tokenizer.json holds merges instead. But sentencepiece numbers its tokens by falling score, so the ids tell the
  scores.
- `gpt2` merges pairs by rank. First it splits the text with the regular expression that `tokenizer.ggml.pre` names.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import gguf
from gguf import TokenType
from transformers import GenerationConfig, PreTrainedTokenizerBase

from phinetune.chats.template import end_of_turn_ids, render
from phinetune.errors import ModelError, at_most

SPACE = "▁"
# The first two are from llama.cpp's converter, the last one from sentencepiece.
SCORE_OF_ADDED, SCORE_OF_UNUSED, SCORE_OF_SPACES = -1000.0, -10000.0, -1e9

# llama.cpp's names for ways to split text before merging, and the regular expressions as in tokenizer.json.
GPT2, DIGITS = "gpt-2", "smollm"
CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
BY_REGEX = {CL100K: "dbrx", O200K: "gpt-4o", QWEN2: "qwen2"}  # of Phi-4, of Phi-4 mini and of Qwen2
WHOLE_WORDS = {"dbrx": "llama-bpe"}  # the same where a piece that is a token is never split (Llama 3's `ignore_merges`)
# llama.cpp's own regular expression for gpt-4o leaves combining marks out of words.
KNOWN_DIFFERENCES = {
    "gpt-4o": "llama.cpp and this tokenizer split scripts with combining marks (Hindi, Khmer, Thai, …) differently"
}

UNCOMPOSED = "this tokenizer composes letters and their accents first (NFC), and llama.cpp does not"

# If `general.name` holds phi-3, llama.cpp strips white space to the right of all special tokens but these.
NOT_STRIPPED = ("<unk>", "<s>", "<|endoftext|>")
# llama.cpp can't load a file whose name holds phi-3 if its tokenizer lacks one of these.
NEEDED_TO_STRIP = {*NOT_STRIPPED, "</s>"}
# llama.cpp ends generation at tokens with these texts, whatever the file says.
ENDS_BY_TEXT = {"<|im_end|>", "<|end|>", "<|endoftext|>", "</s>", "<|eot_id|>", "<|end_of_text|>"}


@dataclass(frozen=True)
class Vocabulary:
    """What a GGUF file says of a tokenizer.

    Attributes:
        model: `llama` or `gpt2`.
        pre: how text is split before merging (gpt2).
        tokens: the tokens by id.
        types: gguf's TokenType of each token.
        scores: the score of each token (llama).
        merges: the merges by rank (gpt2).
        special: the ids of special tokens, by their role: bos, eos, eot, eom, unk, pad.
        add_bos: whether a text gets the start token in front.
        space_first: whether a space is put in front of a text, and of each part after a special token (llama).
        strips: whether llama.cpp must strip white space to the right of special tokens.
        notes: where llama.cpp differs from the tokenizer.
    """

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    scores: list[float] | None
    merges: list[str] | None
    special: dict[str, int]
    add_bos: bool
    space_first: bool
    chat_template: str
    strips: bool
    notes: list[str]

    def write(self, writer: gguf.GGUFWriter) -> None:
        """Add the keys to a writer that has not written its header yet."""
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        if self.scores is not None:
            writer.add_token_scores(self.scores)
        writer.add_token_types(self.types)
        if self.merges is not None:
            # The key must exist, and gguf can't write an empty array. This merge never applies, because symbols start
            # as single characters.
            writer.add_token_merges(self.merges or ["<none> <none>"])
        for role, token in self.special.items():
            getattr(writer, f"add_{role}_token_id")(token)
        writer.add_add_bos_token(self.add_bos)
        writer.add_add_eos_token(False)
        if self.model == "llama" and not self.space_first:
            writer.add_add_space_prefix(False)
        writer.add_chat_template(self.chat_template)


def read_vocabulary(tokenizer: PreTrainedTokenizerBase, generation: GenerationConfig, size: int) -> Vocabulary:
    """The vocabulary of a tokenizer, for a model with `size` rows in its embedding.

    Raises:
        ModelError: neither of llama.cpp's two tokenizers can do what this one does; the error lists all reasons.
    """
    tree = _tokenizer_json(tokenizer)
    problems: list[str] = []
    tokens, types = _tokens(tree, size, problems)
    sentencepiece = bool(tree["model"].get("byte_fallback"))
    space_first = _space_first(tree, problems) if sentencepiece else False
    pre = "default" if sentencepiece else _splitting(tree, problems)
    scores = _scores(tree, tokens, types, problems) if sentencepiece and not problems else None
    if problems:
        raise ModelError([f"{tokenizer.name_or_path}: {problem}" for problem in at_most(problems, 8)])
    special = _special_ids(tokenizer, generation, tokens)
    strips, notes = _stripping(tree, set(tokens))
    return Vocabulary(
        model="llama" if sentencepiece else "gpt2",
        pre=pre,
        tokens=tokens,
        types=types,
        scores=scores,
        merges=None if sentencepiece else [" ".join(pair) for pair in _merges(tree)],
        special=special,
        add_bos=_adds_bos(tokenizer),
        space_first=space_first,
        chat_template=_template(tokenizer),
        strips=strips,
        notes=[*notes, *_unknown_stops(special, generation, tokens), *_known_differences(tree, pre)],
    )


def _tokenizer_json(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The content of tokenizer.json.

    Raises:
        ModelError: there is none, or it is not a BPE tokenizer.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ModelError(f"{tokenizer.name_or_path}: a GGUF takes its tokenizer from tokenizer.json, and there is none")
    tree: dict[str, Any] = json.loads(backend.to_str())
    kind = tree["model"]["type"]
    if kind != "BPE":
        raise ModelError(f"{tokenizer.name_or_path}: a {kind} tokenizer; only BPE tokenizers can be exported")
    return tree


def _tokens(tree: Mapping[str, Any], size: int, problems: list[str]) -> tuple[list[str], list[int]]:
    """Tokens by id, and their types. An id that the tokenizer lacks becomes an unused token."""
    tokens = [f"[PAD{i}]" for i in range(size)]
    types = [int(TokenType.UNUSED)] * size
    has_bytes = bool(tree["model"].get("byte_fallback"))
    added = {token["id"]: token for token in tree["added_tokens"]}
    texts = {i: text for text, i in tree["model"]["vocab"].items()}
    texts |= {i: token["content"] for i, token in added.items()}
    beyond = [i for i in texts if i >= size]
    if beyond:
        problems.append(f"it has tokens up to id {max(beyond)}, and the model's embedding has {size} rows")
        return tokens, types
    for i, text in texts.items():
        tokens[i] = text
        types[i] = _added_type(added[i], by_looks=not has_bytes) if i in added else _type(text, has_bytes)
    return tokens, types


def _added_type(token: Mapping[str, Any], by_looks: bool) -> int:
    """The type of an added token. With `by_looks`, a text of the form `<|…|>` makes it a control token, too."""
    text = token["content"]
    looks_special = by_looks and text.startswith("<|") and text.endswith("|>")
    return int(TokenType.CONTROL if token["special"] or looks_special else TokenType.USER_DEFINED)


def _type(text: str, has_bytes: bool) -> int:
    is_byte = has_bytes and len(text) == 6 and text.startswith("<0x") and text.endswith(">")
    return int(TokenType.BYTE if is_byte else TokenType.NORMAL)


def _merges(tree: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The pairs that are merged, by rank. Older files write a pair as one string."""
    pairs = (pair.split(" ", 1) if isinstance(pair, str) else pair for pair in tree["model"]["merges"])
    return [(left, right) for left, right in pairs]


# -- sentencepiece ---------------------------------------------------------------------------------------------


def _scores(tree: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int], problems: list[str]) -> list[float]:
    """sentencepiece's scores: a learned token has minus its place among the learned tokens. Runs of spaces come last.

    Merging by score does the same as merging by rank under two conditions: every pair that makes a token is a merge,
    and the merges are in the order of the scores. Otherwise a problem is added to `problems`.
    """
    first = next((i for i, kind in enumerate(types) if kind == TokenType.NORMAL), 0)
    scores = [_score(text, kind, i - first) for i, (text, kind) in enumerate(zip(tokens, types, strict=True))]
    ids = {text: i for i, text in enumerate(tokens) if types[i] == TokenType.NORMAL}
    merges = _merges(tree)
    merged = [left + right for left, right in merges]
    ordered = [scores[ids[text]] for text in merged if text in ids]
    pairs = {(t[:i], t[i:]) for t in ids for i in range(1, len(t)) if t[:i] in ids and t[i:] in ids}
    if len(ordered) < len(merged) or any(a < b for a, b in pairwise(ordered)):
        problems.append("its merges are not in the order of its tokens, so llama.cpp's scores can't follow them")
    elif not pairs <= set(merges):
        problems.append(
            f"{len(pairs - set(merges))} pairs that make a token are not merges, but llama.cpp would merge them"
        )
    return scores


def _score(text: str, kind: int, place: int) -> float:
    """A token's score; `place` counts from the first learned token."""
    if kind != TokenType.NORMAL:
        return {TokenType.BYTE: 0.0, TokenType.UNUSED: SCORE_OF_UNUSED}.get(TokenType(kind), SCORE_OF_ADDED)
    return float(-place) if text.strip(SPACE) else SCORE_OF_SPACES


def _space_first(tree: Mapping[str, Any], problems: list[str]) -> bool:
    """Whether each text gets a space in front. Steps that llama.cpp does not have are added to `problems`."""
    steps = [*_steps(tree["normalizer"], "normalizers"), *_steps(tree["pre_tokenizer"], "pretokenizers")]
    first, spaces = False, False
    for step in steps:
        if step == {"type": "Prepend", "prepend": SPACE}:
            first = True
        elif step.get("type") == "Replace" and step.get("pattern") == {"String": " "} and step["content"] == SPACE:
            spaces = True
        elif step.get("type") == "Metaspace" and step["replacement"] == SPACE and not step["split"]:
            spaces, first = True, first or step["prepend_scheme"] == "always"
        else:
            problems.append(f"its step {step.get('type')} ({json.dumps(step)}) does not exist in llama.cpp")
    if not spaces:
        problems.append(f"it does not write spaces as {SPACE}, as llama.cpp does")
    return first


def _steps(part: Mapping[str, Any] | None, key: str) -> list[Mapping[str, Any]]:
    """The steps of a normalizer or a pre-tokenizer. Either may be a sequence of several."""
    if not part:
        return []
    return list(part[key]) if part["type"] == "Sequence" else [part]


# -- gpt2 ------------------------------------------------------------------------------------------------------


def _splitting(tree: Mapping[str, Any], problems: list[str]) -> str:
    """llama.cpp's name for the way this tokenizer splits text before merging. If there is none, a problem is added."""
    if tree["normalizer"] and tree["normalizer"] != {"type": "NFC"}:
        problems.append(f"its normalizer ({tree['normalizer']['type']}) has no counterpart in llama.cpp")
    steps = _steps(tree["pre_tokenizer"], "pretokenizers")
    *splits, last = steps or [{}]
    byte_level = last.get("type") == "ByteLevel" and not last.get("add_prefix_space")
    if byte_level and last.get("use_regex"):
        if not splits:
            return GPT2
        if len(splits) == 1 and splits[0] == {"type": "Digits", "individual_digits": True}:
            return DIGITS
    elif byte_level and not splits and not tree["model"]["merges"]:
        return GPT2  # nothing is merged, so the splitting does not matter
    elif byte_level and len(splits) == 1 and _is_isolating(splits[0]):
        name = BY_REGEX.get(splits[0]["pattern"]["Regex"])
        if name:
            return WHOLE_WORDS.get(name, name) if tree["model"].get("ignore_merges") else name
    problems.append(f"llama.cpp has no splitting of text like this tokenizer's: {json.dumps(steps)}")
    return ""


def _known_differences(tree: Mapping[str, Any], pre: str) -> list[str]:
    known = [KNOWN_DIFFERENCES[pre]] if pre in KNOWN_DIFFERENCES else []
    return [*known, UNCOMPOSED] if tree["normalizer"] == {"type": "NFC"} else known


def _is_isolating(step: Mapping[str, Any]) -> bool:
    """Whether a step splits a text into the matches of a regular expression and what is between them."""
    if step.get("type") != "Split" or "Regex" not in step["pattern"]:
        return False
    return (step["behavior"], step["invert"]) in (("Isolated", False), ("Removed", True))


# -- special tokens --------------------------------------------------------------------------------------------


def _special_ids(
    tokenizer: PreTrainedTokenizerBase, generation: GenerationConfig, tokens: Sequence[str]
) -> dict[str, int]:
    """The ids of start, end, end of turn, … by llama.cpp's names. llama.cpp ends generation at eos, eot and eom."""
    turn = end_of_turn_ids(tokenizer)[:1]
    found = {
        "bos": tokenizer.bos_token_id,
        "eos": tokenizer.eos_token_id,
        "eot": turn[0] if turn else None,
        "unk": tokenizer.unk_token_id,
        "pad": tokenizer.pad_token_id,
    }
    special = {role: int(token) for role, token in found.items() if token is not None}
    unknown = [i for i in _stops(generation) if _is_unknown_stop(i, special, tokens)]
    if unknown:
        special["eom"] = unknown[0]
    return special


def _stops(generation: GenerationConfig) -> list[int]:
    stops = generation.eos_token_id or []
    return [stops] if isinstance(stops, int) else list(stops)


def _is_unknown_stop(token: int, special: Mapping[str, int], tokens: Sequence[str]) -> bool:
    """Whether llama.cpp would not end generation at this token."""
    return token not in special.values() and token < len(tokens) and tokens[token] not in ENDS_BY_TEXT


def _unknown_stops(special: Mapping[str, int], generation: GenerationConfig, tokens: Sequence[str]) -> list[str]:
    left = [tokens[i] for i in _stops(generation) if _is_unknown_stop(i, special, tokens)]
    return (
        [f"llama.cpp does not stop at {', '.join(left)} by itself: give it --reverse-prompt for these"] if left else []
    )


def _adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether llama.cpp must put the start token in front of a text.

    It must if the tokenizer does and if rendered chats start with that token. llama.cpp's tokenizer gets a chat as a
    text, so if the template writes no start token, llama.cpp must not add one.
    """
    if tokenizer.bos_token_id is None or tokenizer("a")["input_ids"][:1] != [tokenizer.bos_token_id]:
        return False
    roles = ("user", "assistant", "user")
    text, start = render(tokenizer, [{"role": role, "content": "a"} for role in roles]), str(tokenizer.bos_token)
    return text.startswith(start) and text.count(start) == 1


def _template(tokenizer: PreTrainedTokenizerBase) -> str:
    template = tokenizer.get_chat_template()
    assert isinstance(template, str)
    return template


def _stripping(tree: Mapping[str, Any], tokens: set[str]) -> tuple[bool, list[str]]:
    """Whether llama.cpp must strip white space after special tokens, and a note if it treats some differently."""
    wanted = {token["content"]: bool(token["rstrip"]) for token in tree["added_tokens"]}
    with_name = {text: text not in NOT_STRIPPED for text in wanted}  # what llama.cpp does if the name holds phi-3
    right_with_name = sum(wanted[text] == with_name[text] for text in wanted)
    right_without = sum(not strip for strip in wanted.values())
    strips = tokens >= NEEDED_TO_STRIP and right_with_name > right_without
    wrong = [text for text, strip in wanted.items() if strip != (strips and with_name[text])]
    if not wrong:
        return strips, []
    return strips, [f"llama.cpp and this tokenizer treat white space after {', '.join(wrong)} differently"]
