"""A newcomer's way through the page in a real browser, from a file to a file of votes and a download."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from helpers import chat
from phinetune.serving.page.words import words_of
from phinetune.serving.state import ServerState
from reporting.browser import LOW_CONTRAST, Browser, chromium
from serving.page.page_helpers import TUNED, offer_run, whole_server
from serving.serving_helpers import KEY, LIMIT_S, keep_file

pytestmark = pytest.mark.slow
Served = tuple[ServerState, str]
ROWS = [chat(f"Say {i}", f"It is {i}.") for i in range(24)]

# What the element with the focus is called.
NAME = """
const e = document.activeElement;
return e.getAttribute("aria-label") || e.labels?.[0]?.textContent.trim() || e.textContent.trim();
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with chromium(tmp_path_factory.mktemp("chromium")) as made:
        yield made


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, tiny_run: Path) -> Iterator[Served]:
    with whole_server(tmp_path_factory.mktemp("served")) as made:
        offer_run(made[0], tiny_run)
        yield made


class Hand:
    """What a person does in the browser; each step waits until it can be done."""

    def __init__(self, browser: Browser) -> None:
        self.driver = browser.driver

    def find(self, css: str, words: str = "") -> Any:
        """The first element that is seen and holds these words."""

        def seen() -> Any:
            found = self.driver.find_elements("css selector", css)
            return next((one for one in found if one.is_displayed() and words in one.text), None)

        return self.wait(seen)

    def press(self, css: str, words: str = "") -> None:
        """Click; again where the page still scrolls to the element, or renewed it."""
        from selenium.common.exceptions import ElementClickInterceptedException, StaleElementReferenceException

        def clicked() -> bool:
            try:
                self.find(css, words).click()
            except (ElementClickInterceptedException, StaleElementReferenceException):
                return False
            return True

        self.wait(clicked)

    def wait(self, seen: Callable[[], Any]) -> Any:
        from selenium.common.exceptions import StaleElementReferenceException

        began = time.monotonic()
        while time.monotonic() - began < LIMIT_S:
            try:
                if found := seen():
                    return found
            except StaleElementReferenceException:  # a part was renewed
                pass
            time.sleep(0.05)
        pytest.fail(
            f"waited too long at {self.driver.current_url}: {self.driver.find_element('tag name', 'main').text}"
        )


def test_from_a_file_to_compared_answers_without_a_command(browser: Browser, served: Served, tmp_path: Path) -> None:
    state, url = served
    hand = Hand(browser)
    good, bad = tmp_path / "rows.jsonl", tmp_path / "bad.jsonl"
    good.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    bad.write_text(json.dumps(ROWS[0]) + '\n{"messages": 3}\n{"a": "<b>"}\n')

    browser.open(f"{url}/#key={KEY}")  # what `phinetune serve` prints
    hand.find("#drop")
    assert "key=" not in browser.driver.current_url
    upload = browser.driver.find_element("css selector", "#file")
    upload.send_keys(str(bad))
    assert "3" in hand.find("#problems td", "3").text
    refused = [line for line in browser.console() if "400" in line]
    assert len(refused) == 1  # Chromium's own line about an answer of this kind

    upload.send_keys(str(good))
    hand.find(".verdict-words.better")
    hand.find(".tok.trained")
    hand.press("#rows-on:not([disabled])")
    hand.find(".row h3", "Row 4 of 24")
    hand.press("#split")

    hand.press("#more summary")
    hand.find("#n_epochs").send_keys("1")
    hand.find("#suffix").send_keys("first")
    hand.press("#plan-it")
    hand.find("#plan .verdict-words.better", "It fits")
    hand.find("#more .chosen", "Chosen")
    hand.press("#start")

    hand.find(".state", "finished")
    hand.wait(lambda: browser.run("return document.querySelectorAll('#plots figure canvas').length") >= 1)
    hand.press(".button.main", "Compare")

    hand.find("#prompt").send_keys("Say 5")
    hand.press("#blind, #prompt-form summary")
    browser.run("document.getElementById('max_tokens').value = 8")
    hand.press("#ask")
    hand.wait(lambda: not browser.run("return document.getElementById('voting').disabled"))
    texts = [one.text for one in browser.driver.find_elements("css selector", ".side .text")]
    assert all(texts)
    if browser.run("return document.querySelector('[data-vote=right]').disabled"):
        pytest.fail("the tuned model answers as its base does, so there is nothing to prefer")
    hand.press("[data-vote=right]")
    hand.press("#make-file")
    hand.find("#method", "DPO")
    assert len(state.store.rows("SELECT * FROM votes WHERE id != 'vote-long'")) == 1

    hand.press("nav a", "Hand on")
    hand.press("form[data-target=gguf-lora] button")
    hand.find("#exports .state")
    hand.press("#exports button")
    browser.driver.switch_to.alert.accept()
    hand.find("#exports .empty")
    assert state.store.rows("SELECT * FROM exports") == []
    assert browser.console() == []
    assert [one for one in browser.requests() if not one.startswith(url)] == []


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_what_goes_wrong_is_told_in_chinese(browser: Browser, served: Served, tmp_path: Path, theme: str) -> None:
    """A wrong key, a file that is none, and a queue that is full; on a phone, above the server's own words."""
    state, url = served
    table, hand = words_of("zh").table, Hand(browser)
    browser.open(f"{url}/", theme, 390)
    browser.driver.delete_all_cookies()
    browser.driver.add_cookie({"name": "phinetune_language", "value": "zh"})
    browser.open(f"{url}/#key=wrong", theme, 390)
    assert "Incorrect key" in hand.find("#message p", table["problem.invalid_api_key"]).text

    browser.open(f"{url}/#key={KEY}", theme, 390)
    hand.find("#drop")
    bad = tmp_path / "bad.jsonl"
    bad.write_bytes(json.dumps(ROWS[0]).encode() + '\n{“messages”: 3}\n{"a": "<b>"}\n'.encode() + "好\n".encode("gbk"))
    browser.driver.find_element("css selector", "#file").send_keys(str(bad))
    rows = {2: "problem.no_json", 3: "finding.form", 4: "finding.encoding"}
    for key in rows.values():
        assert "\n" in hand.find("#problems td.long", table[key]).text
    assert browser.overflow() <= 0
    assert browser.run(LOW_CONTRAST) == []

    keep_file(state, f"file-{theme}")
    settings = state.settings
    state.settings = replace(settings, limits=replace(settings.limits, jobs=0))
    try:
        browser.open(f"{url}/page/train?file=file-{theme}", theme, 390)
        hand.press("#start")
        assert "jobs wait already" in hand.find("#message p", table["problem.rate_limit_exceeded"]).text
    finally:
        state.settings = settings
        browser.driver.delete_all_cookies()
    assert [line for line in browser.console() if not any(code in line for code in ("400", "401", "429"))] == []


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize(("language", "width"), [("en", 1280), ("zh", 390)])
def test_pages_are_readable_in_both_themes_and_on_a_phone(
    browser: Browser, served: Served, theme: str, language: str, width: int
) -> None:
    state, url = served
    if not state.store.row("SELECT 1 FROM files WHERE id = 'file-long'"):
        keep_file(state, "file-long")
        state.store.update("files", "file-long", filename="W" * 200 + ".jsonl", rows=1234567)
        sides = {"preferred_model": f"{TUNED}:ckpt-step-1234", "preferred": "a", "other_model": "tiny", "other": "b"}
        messages = json.dumps([{"role": "user", "content": "W" * 400}])
        state.store.insert("votes", {"id": "vote-long", "created_at": 1, "messages": messages, **sides})
    browser.open(f"{url}/#key={KEY}", theme, width)
    hand = Hand(browser)
    hand.find("main h1")
    browser.driver.add_cookie({"name": "phinetune_language", "value": language})
    for path in ("/", "/page/data", "/page/train", f"/page/compare?model={TUNED}", "/page/hand-on", "/page/files/none"):
        browser.open(url + path, theme, width)
        hand.find("main h1")
        browser.run("document.querySelectorAll('details').forEach((one) => (one.open = true))")
        assert browser.run("return document.documentElement.lang") == {"en": "en", "zh": "zh-Hans"}[language]
        assert browser.overflow() <= 0, path
        assert browser.run(LOW_CONTRAST) == [], path
        told = [line for line in browser.console() if "404" not in line]
        assert told == [], path


def test_all_can_be_done_by_keyboard(browser: Browser, served: Served) -> None:
    """Tab reaches everything that can be pressed, in the order in which it is seen, and each has a name."""
    from selenium.webdriver import ActionChains, Keys

    browser.open(f"{served[1]}/#key={KEY}")
    hand = Hand(browser)
    hand.find("#drop")
    for path in ("/page/data", "/page/train", "/page/compare"):
        browser.open(served[1] + path)
        hand.find("main h1")
        wanted = browser.run(
            "return [...document.querySelectorAll('a[href], button:not(:disabled), input, select, textarea, summary')]"
            ".filter((e) => e.checkVisibility() && !e.closest('fieldset:disabled')).length"
        )
        reached = []
        for _ in range(wanted):
            ActionChains(browser.driver).send_keys(Keys.TAB).perform()
            reached.append(browser.run(NAME))
        assert all(reached), (path, reached)
        assert browser.run("return document.activeElement !== document.body")
