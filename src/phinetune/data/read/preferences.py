"""Turns rows of preferences into a prompt and its answers, each with whether it is the liked one.

A pair is a prompt with two answers. A judged row has one answer, and says whether it is good. Which keys such rows have
stands in `phinetune.config.row_forms`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from phinetune.chats.template import Message
from phinetune.config.row_forms import CHAT_KEYS, JUDGED_FORMS, JUDGED_KEYS, PAIR_FORMS
from phinetune.data.read.messages import (
    MESSAGES_OF,
    completed,
    detect_form,
    looks_like_turns,
    read_turns,
    turn_keys,
)
from phinetune.errors import RowError

YES, NO = ("true", "1", "yes", "good"), ("false", "0", "no", "bad", "-1")
ALIKE = "all answers are scored alike, so none is preferred"
# A turn of a chat as text, as Anthropic's sets have it. `Human:` within a line is a word of the turn that it stands in.
_SPOKEN = re.compile(r"(?:\A|\n\n+)(Human|Assistant): ?")


class Answer(NamedTuple):
    """One answer to a prompt: the turns after it, and whether it is the liked one."""

    messages: list[Message]
    liked: bool


class Preference(NamedTuple):
    """A prompt and its answers: of a pair the chosen one and the rejected one, else one.

    Attributes:
        prompt: the turns before the answers, with the row's system text and tools.
    """

    prompt: list[Message]
    answers: list[Answer]

    def chats(self) -> list[list[Message]]:
        """The chats that end in each answer. The turns before it carry no loss."""
        asked = [{**turn, "train": False} if turn["role"] == "assistant" else turn for turn in self.prompt]
        return [[*asked, *answer.messages] for answer in self.answers]


def read_preference(fields: Mapping[str, Any], form: str = "auto", *, judged: bool = False) -> tuple[str, Preference]:
    """The form of a row, and what it says.

    Args:
        judged: whether rows with one answer are taken too.

    Raises:
        RowError: the row is of no form of preferences, or can't be read as one; its answers belong to unlike prompts.
    """
    forms = (*JUDGED_FORMS, *PAIR_FORMS) if judged else PAIR_FORMS
    if form == "auto":
        if not judged and any(one.fits(fields) for one in JUDGED_FORMS):
            raise RowError("the row has one answer and whether it is good, which objective: kto learns from")
        form = detect_form(fields, forms)
    prompt, answers = _READERS[form](fields)
    return form, _complete(fields, prompt, answers)


def _complete(fields: Mapping[str, Any], prompt: Sequence[Message], answers: Sequence[Answer]) -> Preference:
    """The preference with the row's system text and tools, and each answer checked to be one."""
    source = fields
    if isinstance(fields.get("input"), Mapping):  # OpenAI has the tools there
        source = {**{key: fields[key] for key in CHAT_KEYS if key in fields}, **fields["input"]}
    asked: list[Message] = []
    for answer in answers:
        if not answer.messages or answer.messages[0]["role"] != "assistant":
            raise RowError("an answer does not begin with an assistant's turn", "roles")
        if not prompt or prompt[-1]["role"] == "assistant":
            raise RowError("no question stands before the answers", "roles")
        chat = completed(source, [*prompt, *answer.messages])
        asked = chat[: len(chat) - len(answer.messages)]
    return Preference(asked, list(answers))


def _pair(chosen: list[Message], rejected: list[Message]) -> list[Answer]:
    return [Answer(chosen, True), Answer(rejected, False)]


def _from_openai(fields: Mapping[str, Any]) -> tuple[list[Message], list[Answer]]:
    given = fields["input"]
    if not isinstance(given, Mapping):
        raise RowError("`input` must be an object with `messages`", "content")
    sides = [_side(fields, key) for key in ("preferred_output", "non_preferred_output")]
    return MESSAGES_OF["messages"](given), _pair(*sides)


def _from_responses(fields: Mapping[str, Any]) -> tuple[list[Message], list[Answer]]:
    key = "instruction" if fields.get("instruction") is not None else "prompt"
    sides = [_side(fields, key) for key in ("chosen_response", "rejected_response")]
    return _asked(fields, key), _pair(*sides)


def _from_ultrafeedback(fields: Mapping[str, Any]) -> tuple[list[Message], list[Answer]]:
    """The best and the worst of several answers, by their `overall_score`."""
    answers = fields["completions"]
    scored = [
        (float(one["overall_score"]), one["response"])
        for one in (answers if isinstance(answers, Sequence) else [])
        if isinstance(one, Mapping) and isinstance(one.get("overall_score"), (int, float)) and one.get("response")
    ]
    if len(scored) < 2:
        raise RowError("`completions` needs two answers or more, each with `response` and `overall_score`", "content")
    best, worst = max(scored, key=lambda one: one[0]), min(scored, key=lambda one: one[0])
    if best[0] == worst[0]:
        raise RowError(ALIKE, "equal_answers")
    return _asked(fields, "instruction"), _pair(_spoken(str(best[1])), _spoken(str(worst[1])))


def _from_conversations(fields: Mapping[str, Any]) -> tuple[list[Message], list[Answer]]:
    return MESSAGES_OF["conversations"](fields), _pair(_side(fields, "chosen"), _side(fields, "rejected"))


def _from_alpaca(fields: Mapping[str, Any]) -> tuple[list[Message], list[Answer]]:
    prompt = MESSAGES_OF["alpaca"]({**fields, "output": ""})[:-1]
    return prompt, _pair(_side(fields, "chosen"), _side(fields, "rejected"))


def _from_pair(fields: Mapping[str, Any]) -> tuple[list[Message], list[Answer]]:
    """TRL's forms: the prompt is a column of its own, or the common beginning of both chats."""
    if fields.get("prompt") is None and fields.get("messages") is None:
        chosen, rejected = _texts_apart(fields) or (_side(fields, "chosen"), _side(fields, "rejected"))
        return _apart(chosen, rejected)
    chosen, rejected = _side(fields, "chosen"), _side(fields, "rejected")
    if chosen[0]["role"] != "assistant" or rejected[0]["role"] != "assistant":  # whole chats stand beside the prompt
        prompt, answers = _apart(chosen, rejected)
        own = _asked(fields, "prompt") if fields.get("prompt") is not None else prompt
        if [m["content"].strip() for m in own] != [m["content"].strip() for m in prompt[len(prompt) - len(own) :]]:
            raise RowError("`prompt` and the beginning of `chosen` say different things; keep one of them", "prompts")
        return prompt, answers
    if fields.get("prompt") is not None:
        return _asked(fields, "prompt"), _pair(chosen, rejected)
    return MESSAGES_OF["messages"](fields), _pair(chosen, rejected)


def _apart(chosen: list[Message], rejected: list[Message]) -> tuple[list[Message], list[Answer]]:
    """Two whole chats as their common beginning and two answers."""
    common = 0
    for left, right in zip(chosen[:-1], rejected[:-1], strict=False):
        if left != right:
            break
        common += 1
    if common == 0:
        raise RowError("the chats of `chosen` and `rejected` have no prompt in common", "prompts")
    if chosen[common]["role"] != "assistant" or rejected[common]["role"] != "assistant":
        raise RowError(
            f"`chosen` and `rejected` differ at turn {common + 1}, before an answer; a preference is between two "
            "answers to one prompt",
            "prompts",
        )
    return chosen[:common], _pair(chosen[common:], rejected[common:])


def _texts_apart(fields: Mapping[str, Any]) -> tuple[list[Message], list[Message]] | None:
    """Two texts that begin alike as two chats; None where the columns hold turns.

    A text with `Human:` and `Assistant:` is read turn by turn. Of any other, the common words are the prompt.
    """
    sides = [fields["chosen"], fields["rejected"]]
    if any(not isinstance(text, str) or looks_like_turns(text) for text in sides):
        return None
    if all(_SPOKEN.match(text.strip()) for text in sides):
        return _turns_of(sides[0]), _turns_of(sides[1])
    shared = 0
    for left, right in zip(*sides, strict=False):
        if left != right:
            break
        shared += 1
    words = sides[0][:shared].rfind(" ") + 1 or sides[0][:shared].rfind("\n") + 1
    prompt = sides[0][:words].strip()
    if not prompt:
        raise RowError(
            "the texts of `chosen` and `rejected` have no beginning in common, and there is no `prompt`", "prompts"
        )
    asked: Message = {"role": "user", "content": prompt}
    chosen, rejected = ([asked, *_spoken(text[words:].strip())] for text in sides)
    return chosen, rejected


def _turns_of(text: str) -> list[Message]:
    parts = _SPOKEN.split(text.strip())[1:]
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[who], "content": said.strip()} for who, said in zip(parts[::2], parts[1::2], strict=True)]


def _judged_messages(fields: Mapping[str, Any]) -> tuple[list[Message], list[Answer]]:
    return _last_answer(MESSAGES_OF["messages"](fields), fields)


def _judged_conversations(fields: Mapping[str, Any]) -> tuple[list[Message], list[Answer]]:
    return _last_answer(MESSAGES_OF["conversations"](fields), fields)


def _judged_alpaca(fields: Mapping[str, Any]) -> tuple[list[Message], list[Answer]]:
    return _last_answer(MESSAGES_OF["alpaca"](fields), fields)


def _judged(fields: Mapping[str, Any]) -> tuple[list[Message], list[Answer]]:
    return _asked(fields, "prompt"), [Answer(_side(fields, "completion"), _liked(fields))]


def _last_answer(chat: list[Message], fields: Mapping[str, Any]) -> tuple[list[Message], list[Answer]]:
    """A chat as what stands before its last answer, and this answer."""
    asked = max((i for i, message in enumerate(chat) if message["role"] == "user"), default=-1) + 1
    return chat[:asked], [Answer(chat[asked:], _liked(fields))]


def _liked(fields: Mapping[str, Any]) -> bool:
    key = next(key for key in JUDGED_KEYS if fields.get(key) is not None or key in fields)
    value = fields[key]
    # Tables with a gap in a column of integers hold it as floats.
    text = str(int(value) if isinstance(value, float) and value.is_integer() else value).strip().lower()
    if text not in (*YES, *NO):
        raise RowError(f"`{key}` must be true or false, not {fields[key]!r}", "content")
    return text in YES


def _asked(fields: Mapping[str, Any], key: str) -> list[Message]:
    """The prompt in a column: a text, or turns."""
    value = fields.get(key)
    if isinstance(value, str) and not looks_like_turns(value):
        return [{"role": "user", "content": value}]
    return read_turns(fields, key, "role", "content")


def _side(fields: Mapping[str, Any], key: str) -> list[Message]:
    """The answer in a column, or the whole chat: a text, a turn, or a list of turns."""
    value = fields.get(key)
    if isinstance(value, str) and not looks_like_turns(value):
        return _spoken(value)
    if isinstance(value, Mapping):
        value = [value]
    turns = value if isinstance(value, (list, tuple)) else []
    return read_turns({key: value}, key, *turn_keys(turns))


def _spoken(text: str) -> list[Message]:
    return [{"role": "assistant", "content": text}]


_READERS: dict[str, Callable[[Mapping[str, Any]], tuple[list[Message], list[Answer]]]] = {
    "pair_openai": _from_openai,
    "pair_responses": _from_responses,
    "pair_ultrafeedback": _from_ultrafeedback,
    "pair_conversations": _from_conversations,
    "pair_alpaca": _from_alpaca,
    "pair": _from_pair,
    "judged_messages": _judged_messages,
    "judged_conversations": _judged_conversations,
    "judged_alpaca": _judged_alpaca,
    "judged": _judged,
}
