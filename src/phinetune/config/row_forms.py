"""The table of the forms that a row of chat data may have. The configuration, detection and error messages use it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple


class RowForm(NamedTuple):
    """One form of rows.

    Attributes:
        name: the form's name in `data.format`.
        keys: groups of keys. A row that has all keys of one group has this form.
        is_ready: whether such a row is text or token ids already, so that no template renders it.
        more: keys beside these that are read where a row has them. Rows that become chats also have `CHAT_KEYS`.
    """

    name: str
    keys: tuple[tuple[str, ...], ...]
    is_ready: bool = False
    more: tuple[str, ...] = ()

    def fits(self, keys: Collection[str]) -> bool:
        """Whether a row with these keys has this form."""
        return any(all(key in keys for key in group) for group in self.keys)

    @property
    def read(self) -> frozenset[str]:
        """All keys that are read of such a row."""
        return frozenset((*(key for group in self.keys for key in group), *self.more, *CHAT_KEYS * (not self.is_ready)))


CHAT_KEYS = ("system", "tools", "functions")
# Masks of a row of ids: which ids are no padding, and which are trained on (as TRL and others write it).
ATTENTION_MASK = "attention_mask"
LABEL_MASKS = ("completion_mask", "assistant_masks", "loss_mask")
JUDGED_KEYS = ("label", "kto_tag")  # whether an answer is good, as TRL and LLaMA-Factory write it


def _with_label(*keys: str) -> tuple[tuple[str, ...], ...]:
    """Groups of keys of a form, with each of the keys that say whether an answer is good."""
    return tuple((*keys, label) for label in JUDGED_KEYS)


# In the order of detection: the first form that fits a row is taken.
ROW_FORMS = (
    RowForm("messages", (("messages",),)),
    RowForm("conversations", (("conversations",), ("conversation",))),
    RowForm("alpaca", (("instruction", "output"),), more=("input", "history")),
    RowForm("prompt_completion", (("prompt", "completion"),)),
    RowForm("tokens", (("input_ids",),), is_ready=True, more=("labels", ATTENTION_MASK, *LABEL_MASKS)),
    RowForm("text", (("text",),), is_ready=True),
)
# Rows with two answers to one prompt, of which one is preferred; in the order of detection.
PAIR_FORMS = (
    RowForm("pair_openai", (("input", "preferred_output", "non_preferred_output"),)),
    RowForm("pair_responses", (("chosen_response", "rejected_response"),), more=("instruction", "prompt")),
    RowForm("pair_ultrafeedback", (("instruction", "completions"),)),
    RowForm("pair_conversations", (("conversations", "chosen", "rejected"), ("conversation", "chosen", "rejected"))),
    RowForm("pair_alpaca", (("instruction", "chosen", "rejected"),), more=("input", "history")),
    RowForm("pair", (("chosen", "rejected"),), more=("prompt", "messages")),
)
# Rows with one answer, and whether it is good.
JUDGED_FORMS = (
    RowForm("judged_messages", _with_label("messages")),
    RowForm("judged_conversations", (*_with_label("conversations"), *_with_label("conversation"))),
    RowForm("judged_alpaca", _with_label("instruction", "output"), more=("input", "history")),
    RowForm("judged", _with_label("prompt", "completion")),
)
FORM_NAMES = tuple(form.name for form in ROW_FORMS)
ALL_FORMS = (*ROW_FORMS, *PAIR_FORMS, *JUDGED_FORMS)
PREFERENCE_NAMES = tuple(form.name for form in (*PAIR_FORMS, *JUDGED_FORMS))
READY = tuple(form.name for form in ROW_FORMS if form.is_ready)


def expected_keys(forms: Sequence[RowForm] = ROW_FORMS) -> str:
    """The keys of forms, for an error message: "`messages`, …, or `text`"."""
    shown = [" and ".join(f"`{key}`" for key in form.keys[0]) for form in forms]
    return f"{', '.join(shown[:-1])}, or {shown[-1]}"
