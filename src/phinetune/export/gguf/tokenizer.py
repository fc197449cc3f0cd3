"""A tokenizer as llama.cpp's GGUF keys: tokens, their kinds, scores or merges, special ids, the chat template.

llama.cpp has two tokenizers for this family. `llama` is sentencepiece's: it merges the pair whose token has the highest
score, so Phi-3's scores are needed, and tokenizer.json holds merges instead; sentencepiece numbers its tokens by
falling score, which gives them back. `gpt2` merges by rank after splitting the text with the regular expression that
`tokenizer.ggml.pre` names.
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

from phinetune.chat.template import end_of_turn_ids, render
from phinetune.errors import ModelError, at_most

SPACE = "▁"
SCORE_OF_ADDED, SCORE_OF_UNUSED, SCORE_OF_SPACES = -1000.0, -10000.0, -1e9  # llama.cpp's converter, sentencepiece

# Splitting before merging, by what tokenizer.json calls it.
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
BY_REGEX = {CL100K: "dbrx", O200K: "gpt-4o"}  # Phi-4's, Phi-4 mini's
# llama.cpp's own form of the last leaves combining marks out of words.
KNOWN_DIFFERENCES = {
    "gpt-4o": "llama.cpp splits scripts with combining marks (Hindi, Khmer, Thai, …) otherwise than this tokenizer does"
}

# llama.cpp strips white space to the right of special tokens where `general.name` has phi-3 in it: of all but these.
NOT_STRIPPED = ("<unk>", "<s>", "<|endoftext|>")
NEEDED_TO_STRIP = {*NOT_STRIPPED, "</s>"}  # without one of them such a name makes the file fail to load
# It ends generation at these by their text alone.
ENDS_BY_TEXT = {"<|im_end|>", "<|end|>", "<|endoftext|>", "</s>", "<|eot_id|>", "<|end_of_text|>"}


@dataclass(frozen=True)
class Vocabulary:
    """What llama.cpp is told of a tokenizer.

    Attributes:
        model: `llama` or `gpt2`.
        pre: how text is split before merging (gpt2).
        types: of `tokens`, gguf's TokenType.
        scores: of `tokens` (llama).
        merges: by rank (gpt2).
        special: ids by their part: bos, eos, eot, eom, unk, pad.
        add_bos: whether a text gets the start token.
        space_first: whether a text, and each one behind a special token, gets a space in front (llama).
        strips: whether llama.cpp must strip white space to the right of special tokens.
        notes: where llama.cpp will differ from the tokenizer.
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
        """Add the keys to a file that is not yet open."""
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        if self.scores is not None:
            writer.add_token_scores(self.scores)
        writer.add_token_types(self.types)
        if self.merges is not None:
            # The key must be there and an empty array can't be; symbols start as single characters, so this is none.
            writer.add_token_merges(self.merges or ["<none> <none>"])
        for part, token in self.special.items():
            getattr(writer, f"add_{part}_token_id")(token)
        writer.add_add_bos_token(self.add_bos)
        writer.add_add_eos_token(False)
        if self.model == "llama" and not self.space_first:
            writer.add_add_space_prefix(False)
        writer.add_chat_template(self.chat_template)


def read_vocabulary(tokenizer: PreTrainedTokenizerBase, generation: GenerationConfig, size: int) -> Vocabulary:
    """The vocabulary of a tokenizer for a model with `size` rows in its embedding.

    Raises:
        ModelError: a tokenizer that neither of llama.cpp's two can do; all that is in the way.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ModelError(f"{tokenizer.name_or_path}: llama.cpp's form is made of tokenizer.json, and there is none")
    tree = json.loads(backend.to_str())
    kind = tree["model"]["type"]
    if kind != "BPE":
        raise ModelError(f"{tokenizer.name_or_path}: a {kind} tokenizer; BPE ones can be exported")
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
        "llama" if sentencepiece else "gpt2",
        pre,
        tokens,
        types,
        scores,
        None if sentencepiece else [" ".join(pair) for pair in _merges(tree)],
        special,
        _adds_bos(tokenizer),
        space_first,
        _template(tokenizer),
        strips,
        [*notes, *_stops_unknown(special, generation, tokens), *_known_difference(pre)],
    )


def _tokens(tree: Mapping[str, Any], size: int, problems: list[str]) -> tuple[list[str], list[int]]:
    """Tokens by id and their kinds; ids that the tokenizer lacks are unused ones."""
    tokens = [f"[PAD{i}]" for i in range(size)]
    types = [int(TokenType.UNUSED)] * size
    bytes_too = bool(tree["model"].get("byte_fallback"))
    added = {token["id"]: token for token in tree["added_tokens"]}
    texts = {i: text for text, i in tree["model"]["vocab"].items()}
    texts |= {i: token["content"] for i, token in added.items()}
    beyond = [i for i in texts if i >= size]
    if beyond:
        problems.append(f"it has tokens up to id {max(beyond)}, and the model's embedding has {size} rows")
        return tokens, types
    for i, text in texts.items():
        tokens[i] = text
        types[i] = _added_type(added[i], not bytes_too) if i in added else _type(text, bytes_too)
    return tokens, types


def _added_type(token: Mapping[str, Any], by_looks: bool) -> int:
    text = token["content"]
    looks_special = by_looks and text.startswith("<|") and text.endswith("|>")
    return int(TokenType.CONTROL if token["special"] or looks_special else TokenType.USER_DEFINED)


def _type(text: str, bytes_too: bool) -> int:
    is_byte = bytes_too and len(text) == 6 and text.startswith("<0x") and text.endswith(">")
    return int(TokenType.BYTE if is_byte else TokenType.NORMAL)


def _merges(tree: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The pairs by rank. Older files write a pair as one string."""
    pairs = (pair.split(" ", 1) if isinstance(pair, str) else pair for pair in tree["model"]["merges"])
    return [(left, right) for left, right in pairs]


# -- sentencepiece ---------------------------------------------------------------------------------------------


def _scores(tree: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int], problems: list[str]) -> list[float]:
    """sentencepiece's scores: minus the place among the learned tokens; runs of spaces come last.

    Merging by these is merging by rank if every pair that makes a token is a merge, in the order of the scores.
    """
    first = next((i for i, kind in enumerate(types) if kind == TokenType.NORMAL), 0)
    by_kind = {TokenType.BYTE: 0.0, TokenType.UNUSED: SCORE_OF_UNUSED}
    scores = [
        by_kind.get(TokenType(kind), SCORE_OF_ADDED)
        if kind != TokenType.NORMAL
        else SCORE_OF_SPACES
        if not text.strip(SPACE)
        else float(first - i)
        for i, (text, kind) in enumerate(zip(tokens, types, strict=True))
    ]
    ids = {text: i for i, text in enumerate(tokens) if types[i] == TokenType.NORMAL}
    merges = _merges(tree)
    made = [left + right for left, right in merges]
    ordered = [scores[ids[text]] for text in made if text in ids]
    pairs = {(t[:i], t[i:]) for t in ids for i in range(1, len(t)) if t[:i] in ids and t[i:] in ids}
    if len(ordered) < len(made) or any(a < b for a, b in pairwise(ordered)):
        problems.append("its merges are not in the order of its tokens, so llama.cpp's scores can't follow them")
    elif not pairs <= set(merges):
        problems.append(
            f"{len(pairs - set(merges))} pairs that make a token are no merges, and llama.cpp would merge them"
        )
    return scores


def _space_first(tree: Mapping[str, Any], problems: list[str]) -> bool:
    """Whether each text gets a space in front, and whether spaces are written as `▁`."""
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
            problems.append(f"its step {step.get('type')} ({json.dumps(step)}) is none that llama.cpp has")
    if not spaces:
        problems.append(f"it does not write spaces as {SPACE}, as llama.cpp does")
    return first


def _steps(part: Mapping[str, Any] | None, key: str) -> list[Mapping[str, Any]]:
    """The steps of a normalizer or a pre-tokenizer, which may be a sequence of several."""
    if not part:
        return []
    return list(part[key]) if part["type"] == "Sequence" else [part]


# -- gpt2 ------------------------------------------------------------------------------------------------------


def _splitting(tree: Mapping[str, Any], problems: list[str]) -> str:
    """llama.cpp's name for how the text is split before merging."""
    if tree["normalizer"]:
        problems.append(f"its normalizer ({tree['normalizer']['type']}) has no counterpart in llama.cpp")
    steps = _steps(tree["pre_tokenizer"], "pretokenizers")
    *splits, last = steps or [{}]
    whole = last.get("type") == "ByteLevel" and not last.get("add_prefix_space")
    if whole and last.get("use_regex"):
        if not splits:
            return GPT2
        if len(splits) == 1 and splits[0] == {"type": "Digits", "individual_digits": True}:
            return DIGITS
    elif whole and not splits and not tree["model"]["merges"]:
        return GPT2  # nothing is merged, so nothing need be split
    elif whole and len(splits) == 1 and _is_isolating(splits[0]):
        name = BY_REGEX.get(splits[0]["pattern"]["Regex"])
        if name:
            return name
    problems.append(f"its splitting of text before merging is none that llama.cpp has: {json.dumps(steps)}")
    return ""


def _known_difference(pre: str) -> list[str]:
    return [KNOWN_DIFFERENCES[pre]] if pre in KNOWN_DIFFERENCES else []


def _is_isolating(step: Mapping[str, Any]) -> bool:
    if step.get("type") != "Split" or "Regex" not in step["pattern"]:
        return False
    return (step["behavior"], step["invert"]) in (("Isolated", False), ("Removed", True))


# -- special tokens --------------------------------------------------------------------------------------------


def _special_ids(
    tokenizer: PreTrainedTokenizerBase, generation: GenerationConfig, tokens: Sequence[str]
) -> dict[str, int]:
    """Start, end, end of turn, … by llama.cpp's names. Generation ends at eos, eot and eom."""
    turn = end_of_turn_ids(tokenizer)[:1]
    found = {
        "bos": tokenizer.bos_token_id,
        "eos": tokenizer.eos_token_id,
        "eot": turn[0] if turn else None,
        "unk": tokenizer.unk_token_id,
        "pad": tokenizer.pad_token_id,
    }
    special = {part: int(token) for part, token in found.items() if token is not None}
    others = [i for i in _stops(generation) if _is_unknown_stop(i, special, tokens)]
    if others:
        special["eom"] = others[0]
    return special


def _stops(generation: GenerationConfig) -> list[int]:
    stops = generation.eos_token_id or []
    return [stops] if isinstance(stops, int) else list(stops)


def _is_unknown_stop(token: int, special: Mapping[str, int], tokens: Sequence[str]) -> bool:
    return token not in special.values() and token < len(tokens) and tokens[token] not in ENDS_BY_TEXT


def _stops_unknown(special: Mapping[str, int], generation: GenerationConfig, tokens: Sequence[str]) -> list[str]:
    left = [tokens[i] for i in _stops(generation) if _is_unknown_stop(i, special, tokens)]
    return [f"llama.cpp won't stop at {', '.join(left)} by itself: give it --reverse-prompt for these"] if left else []


def _adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether llama.cpp is to put the start token in front: where the tokenizer does, and rendered chats have it.

    A chat reaches llama.cpp's tokenizer as a text, so where the template has no start token it must not add one.
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
    """Whether llama.cpp is to strip white space behind special tokens, and the tokens it will get wrong either way."""
    strips = {token["content"]: bool(token["rstrip"]) for token in tree["added_tokens"]}
    named = {text: text not in NOT_STRIPPED for text in strips}
    right = sum(strips[text] == named[text] for text in strips)
    by_name = tokens >= NEEDED_TO_STRIP and right > sum(not strip for strip in strips.values())
    wrong = [text for text, strip in strips.items() if strip != (by_name and named[text])]
    if not wrong:
        return by_name, []
    return by_name, [f"llama.cpp treats white space behind {', '.join(wrong)} otherwise than this tokenizer does"]
