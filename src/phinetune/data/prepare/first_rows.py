"""A look at the first rows of a source before all others: what stops every row is said once, and at once."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence

from phinetune.config.data import DataSection
from phinetune.config.row_forms import ALL_FORMS, FORM_NAMES, ROW_FORMS, RowForm
from phinetune.data.read.messages import KEYS_SHOWN, detect_form, shown
from phinetune.data.read.propose import propose
from phinetune.data.read.row import Row
from phinetune.data.read.row_mapping import RowMapping, root_of
from phinetune.errors import DataError, RowError

LOOKED_AT = 50


def look_at_first(source: str, rows: Sequence[Row], section: DataSection, forms: Sequence[str] = FORM_NAMES) -> None:
    """Make sure that the columns which the section names are there, or that one of the first rows has a known form.

    Args:
        forms: the names of the forms of rows that the run takes.

    Raises:
        DataError: none of the first rows has a column that is named (the error lists these columns); or nothing is
            said of the columns, and no row is of a known form.
    """
    first = rows[:LOOKED_AT]
    if not first:
        return
    mapping = RowMapping.of(section)
    if mapping and mapping.function:
        return
    problems = missing_columns(source, [row.fields for row in first], mapping) if mapping else []
    if problems:
        raise DataError(problems)
    if not mapping and section.format == "auto":
        is_chat, taken = tuple(forms) == FORM_NAMES, [form for form in ALL_FORMS if form.name in forms]
        _refuse_unknown(source, first, ROW_FORMS if is_chat else taken)


def missing_columns(source: str, rows: Sequence[Mapping[str, object]], mapping: RowMapping) -> list[str]:
    """A sentence for each column that the mapping names and no row has."""
    names = list(dict.fromkeys(key for row in rows for key in row))
    there = ", ".join([*map(shown, names[:KEYS_SHOWN]), *(["…"] if len(names) > KEYS_SHOWN else [])])
    problems = []
    for column, knob in dict.fromkeys(mapping.needed()):
        if any(root_of(row, column) is not None for row in rows):
            continue
        near = difflib.get_close_matches(column.lower(), [name.lower() for name in names], n=1, cutoff=0.6)
        meant = next((name for name in names if near and name.lower() == near[0]), None)
        hint = f"; did you mean `{shown(meant)}`?" if meant else ""
        problems.append(f"{knob}: {source} has the columns {there}, and none is named `{shown(column)}`{hint}")
    return problems


def _refuse_unknown(source: str, rows: Sequence[Row], forms: Sequence[RowForm]) -> None:
    """Refuse a source of whose rows none has a known form, in one sentence, with what would read them.

    Raises:
        DataError: see above.
    """
    problem = ""
    for row in rows:
        try:
            detect_form(row.fields, forms)
            return
        except RowError as error:
            problem = problem or str(error).partition("; or below `data:`")[0]
    # What is proposed are the columns of a chat.
    advice = propose([row.fields for row in rows]).advice(source) if forms is ROW_FORMS else []
    raise DataError([f"{rows[0].where}: {problem}", *advice])
