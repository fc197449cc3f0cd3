"""The table of forms is what the configuration, the readers and docs/data.md go by."""

from __future__ import annotations

from pathlib import Path

import pytest

from phinetune.config.row_forms import FORM_NAMES, READY, ROW_FORMS, RowForm, expected_keys
from phinetune.config.run import describe_config, make_config
from phinetune.data.read.messages import MESSAGES_OF, detect_form
from phinetune.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]


def test_every_form_that_a_template_renders_has_a_reader() -> None:
    assert {*MESSAGES_OF, *READY} == set(FORM_NAMES)
    assert not set(MESSAGES_OF) & set(READY)


@pytest.mark.parametrize("form", ROW_FORMS, ids=FORM_NAMES)
def test_each_set_of_keys_is_detected_and_named(form: RowForm) -> None:
    for keys in form.keys:
        assert detect_form(dict.fromkeys([*keys, "another"], "x")) == form.name
    assert all(f"`{key}`" in expected_keys() for key in form.keys[0])


@pytest.mark.parametrize("form", ROW_FORMS, ids=FORM_NAMES)
def test_the_configuration_and_the_page_on_data_know_each_form(form: RowForm) -> None:
    assert make_config({"data": {"format": form.name}}).data.format == form.name
    assert form.name in {key: text for key, _, text in describe_config()}["data.format"]
    table = (
        (ROOT / "docs" / "data.md").read_text(encoding="utf-8").partition("| form | a row |")[2].partition("\n\n")[0]
    )
    assert all(f'"{key}"' in table for key in form.keys[0])


def test_another_form_is_refused_with_all_that_there_are() -> None:
    with pytest.raises(ConfigError) as caught:
        make_config({"data": {"format": "jsonl"}})
    assert all(repr(name) in str(caught.value) for name in ("auto", *FORM_NAMES))
