"""Reads rows that are made already: a text, or token ids with labels or masks that say what is trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from phinetune.config.row_forms import ATTENTION_MASK, LABEL_MASKS
from phinetune.data.read.messages import check_letters
from phinetune.data.read.safe_json import load_json
from phinetune.engine.examples import IGNORED, Encoded
from phinetune.errors import RowError

PADDED = "padded"
PADDING_IDS = 8  # so many equal ids at an end of a row are taken for padding


def read_text(fields: Mapping[str, Any]) -> str:
    """The text of a row `{"text": …}`.

    Raises:
        RowError: the text is missing or empty, or it can't be encoded.
    """
    text = fields.get("text")
    if not isinstance(text, str) or not text.strip():
        raise RowError("`text` must be text, and not empty", "content")
    check_letters(text)
    return text


def read_ids(fields: Mapping[str, Any], vocabulary: int) -> Encoded:
    """The ids and labels of a row `{"input_ids": …, "labels": …}`. Without labels, every token is trained on.

    `completion_mask`, `assistant_masks` and `loss_mask` say which tokens are trained on, by 1 and 0. Padding, which is
    0 in `attention_mask`, is cut off.

    Args:
        vocabulary: the highest id of the tokenizer, plus one.

    Raises:
        RowError: `input_ids` is not a list of ids of this vocabulary; a label is neither -100 nor the id at the same
            place; a mask is no mask of these ids, has a hole, or contradicts the labels.
    """
    ids = _whole_numbers(fields, "input_ids")
    if not ids:
        raise RowError("`input_ids` must be a list of whole numbers", "labels")
    if min(ids) < 0 or max(ids) >= vocabulary:
        raise RowError(
            f"`input_ids` holds {max(ids) if min(ids) >= 0 else min(ids)}, and this tokenizer's ids go from 0 to "
            f"{vocabulary - 1}; the row was made for another tokenizer",
            "labels",
        )
    given = _whole_numbers(fields, "labels")
    start, stop = _attended(_mask(fields, ATTENTION_MASK, len(ids)))
    _check_labels(ids, given, start, stop)
    labels = _masked_labels(fields, ids, given, start, stop)
    return Encoded(ids[start:stop], labels[start:stop])


def seems_padded(encoded: Encoded) -> bool:
    """Whether a row of ids trains on what looks like padding: the same id again and again at one of its ends."""
    ids, labels = encoded.input_ids, encoded.labels
    for part in (slice(0, PADDING_IDS), slice(-PADDING_IDS, None)):
        if len(ids) > PADDING_IDS and len(set(ids[part])) == 1 and IGNORED not in labels[part]:
            return True
    return False


def _whole_numbers(fields: Mapping[str, Any], key: str) -> list[int] | None:
    """A list of whole numbers, also as JSON text (a cell of a CSV file); None if the row has none."""
    value = fields.get(key)
    if isinstance(value, str) and value:
        try:
            value = load_json(value)
        except ValueError:
            value = ()
    if value is None:
        return None
    if not isinstance(value, (list, tuple)) or not value or any(type(i) is not int for i in value):
        hint = " as long as `input_ids`" if key != "input_ids" else ""
        raise RowError(f"`{key}` must be a list of whole numbers{hint}", "labels")
    return list(value)


def _check_labels(ids: Sequence[int], labels: Sequence[int] | None, start: int, stop: int) -> None:
    """Make sure that every label is the id at its place, or says that there is no loss. Padding may have any."""
    if labels is None:
        return
    if len(labels) != len(ids):
        raise RowError("`labels` must be a list of whole numbers as long as `input_ids`", "labels")
    wrong = next((i for i in range(start, stop) if labels[i] not in (IGNORED, ids[i])), None)
    if wrong is not None:
        raise RowError(
            f"`labels` must hold {IGNORED} or the id at the same place (they are shifted in training), and place "
            f"{wrong} holds {labels[wrong]} beside id {ids[wrong]}",
            "labels",
        )


def _mask(fields: Mapping[str, Any], key: str, length: int) -> list[bool]:
    """A mask of the row; all true if the row has none."""
    value = fields.get(key)
    if isinstance(value, (list, tuple)) and any(isinstance(i, bool) for i in value):
        value = [int(i) if isinstance(i, bool) else i for i in value]
    mask = _whole_numbers({key: value}, key)
    if mask is None:
        return [True] * length
    if len(mask) != length or set(mask) - {0, 1}:
        raise RowError(f"`{key}` must hold 1 or 0 for each of `input_ids` ({length} of them)", "labels")
    return [value == 1 for value in mask]


def _attended(mask: Sequence[bool]) -> tuple[int, int]:
    """Where the ids without the padding around them begin and end.

    Raises:
        RowError: padding stands among the ids, or there is nothing else.
    """
    count = sum(mask)
    start = mask.index(True) if count else 0
    if not count or not all(mask[start : start + count]):
        what = "is 0 in the middle of the row" if count else "holds nothing but 0"
        raise RowError(f"`{ATTENTION_MASK}` {what}; padding stands before or after the ids", "labels")
    return start, start + count


def _masked_labels(
    fields: Mapping[str, Any], ids: Sequence[int], given: Sequence[int] | None, start: int, stop: int
) -> list[int]:
    """The labels by the masks that say what is trained on, or as they are given.

    Raises:
        RowError: a mask and the labels contradict each other between `start` and `stop`.
    """
    masks = [key for key in LABEL_MASKS if fields.get(key) not in (None, "")]
    if not masks:
        return list(given or ids)
    trained = [all(one) for one in zip(*(_mask(fields, key, len(ids)) for key in masks), strict=True)]
    labels = [i if is_trained else IGNORED for i, is_trained in zip(ids, trained, strict=True)]
    if given is not None and list(given[start:stop]) != labels[start:stop]:
        raise RowError(f"`labels` and `{'`, `'.join(masks)}` say different things; keep one of them", "labels")
    return labels
