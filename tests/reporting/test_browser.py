"""The page in a real browser: quiet, self-contained, drawn, readable in both themes and on a phone."""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from phinetune.reporting.render import write_comparison, write_report
from phinetune.reporting.watch import make_server
from phinetune.run_folder import RunFolder
from reporting.browser import LOW_CONTRAST, MISSING_CURVES, Browser, chromium
from reporting.report_helpers import CLASSES, DIFFERENCES, EVALUATION, OWN, OWN_EVALUATION, entry, example, make_run

LOOKS = list(itertools.product(("light", "dark"), (1280, 390)))
EVIL = "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'><!--"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with chromium(tmp_path_factory.mktemp("chromium")) as made:
        yield made


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A page with everything on it: intervals, tags, flags, JSON fields, notes, long words."""
    folder = make_run(
        tmp_path_factory.mktemp("runs") / "everything",
        differences=DIFFERENCES,
        by_tag={"billing": {"rows": 30, **EVALUATION}, "delivery": {"rows": 50, **EVALUATION}},
        json_fields={"base": {"order": 10.0}, "tuned": {"order": 98.8}},
        evaluation=OWN_EVALUATION,
        classes=CLASSES,
        own=OWN,
        flags=["12% of the tuned model's answers go in circles."],
        examples=[example(i) for i in range(1, 5)] + [example(5, prompt="W" * 400), example(6, prompt=EVIL)],
    )
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 31, "lo')
    return write_report(folder).as_uri()


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("compared")
    runs = [make_run(folder / name, scale=scale) for name, scale in (("one", 1), ("two", 0.8), ("three", 0.6))]
    return write_comparison(runs, folder / "comparison.html").as_uri()


@pytest.mark.parametrize(("theme", "width"), LOOKS)
@pytest.mark.parametrize("name", ["page", "comparison"])
def test_a_page_is_quiet_whole_and_readable(
    browser: Browser, name: str, theme: str, width: int, request: pytest.FixtureRequest
) -> None:
    url = request.getfixturevalue(name)
    browser.open(url, theme, width)
    assert browser.run("return document.querySelectorAll('figure canvas').length") == 7
    assert browser.overflow() == 0
    assert browser.run(LOW_CONTRAST) == []
    assert browser.console() == []
    assert browser.requests() == [url]
    assert browser.run(MISSING_CURVES) == []  # last: Chromium logs a hint about reading pixels


def test_the_number_under_the_pointer_is_read_out_in_every_plot(browser: Browser, page: str) -> None:
    from selenium.webdriver import ActionChains

    browser.open(page)
    outputs = "return [...document.querySelectorAll('figure output')].map((o) => o.textContent)"
    before = browser.run(outputs)
    assert before[0].endswith("step 30")
    plot = browser.driver.find_element("css selector", "figure[data-chart=loss] .u-over")
    ActionChains(browser.driver).move_to_element(plot).perform()
    after = browser.run(outputs)
    assert after[0].endswith("step 15") or after[0].endswith("step 16")
    step = int(after[0].rsplit(" ", 1)[1])
    assert after[0].startswith(f"{entry(step)['loss']:.3f}")
    assert after[2].endswith(f"step {step}")  # the learning rate, at the same step: plots share their pointer


def test_arrow_keys_move_the_pointer(browser: Browser, page: str) -> None:
    browser.open(page)
    plot = browser.driver.find_element("css selector", "figure[data-chart=loss] .plot")
    plot.send_keys("\ue012")  # left
    plot.send_keys("\ue012")
    assert browser.run("return document.querySelector('figure[data-chart=loss] output').textContent").endswith(
        "step 28"
    )


def test_marks_change_with_what_an_answer_is_held_against(browser: Browser, page: str) -> None:
    browser.open(page)
    marked = """return [...document.querySelector('.answered').querySelectorAll('mark')]
        .filter((m) => m.checkVisibility()).map((m) => m.textContent)"""
    assert browser.run(marked) == ["sad", "glad"]
    browser.run("document.getElementById('marks-reference').click()")
    assert browser.run(marked) == ["sad"]


def test_an_answer_can_not_break_out_of_the_page(browser: Browser, page: str) -> None:
    browser.open(page)
    assert browser.run("return window.hacked") is None
    prompts = browser.run("return [...document.querySelectorAll('#answers .answered h3')].map((h) => h.textContent)")
    assert prompts[-1].endswith(EVIL)


def test_a_script_that_is_not_the_pages_own_does_not_run(browser: Browser, page: str) -> None:
    browser.open(page)
    browser.run(
        "const s = document.createElement('script'); s.textContent = 'window.hacked = 1'; document.body.append(s)"
    )
    assert browser.run("return window.hacked") is None
    assert any("Content Security Policy" in line for line in browser.console())


def test_a_dark_page_is_printed_in_light_colours(browser: Browser, page: str) -> None:
    browser.open(page, "dark")
    printed = {"media": "print", "features": [{"name": "prefers-color-scheme", "value": "dark"}]}
    browser.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", printed)
    time.sleep(0.2)
    assert browser.run("return getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert browser.run(MISSING_CURVES) == []
    assert browser.run(LOW_CONTRAST) == []


def test_a_watched_page_renews_itself_without_a_reload(browser: Browser, tmp_path: Path) -> None:
    folder = RunFolder(make_run(tmp_path / "run", steps=0, finished=False))
    server = make_server(folder.path, 0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        url = server.url
        browser.open(url)
        browser.run("window.stayed = true")
        assert browser.run("return document.querySelectorAll('canvas').length") == 0
        for steps in (8, 12):
            folder.metrics.write_text("".join(json.dumps(entry(s)) + "\n" for s in range(1, steps + 1)))
            wait_for(browser, f"return document.body.innerText.includes('in {steps} of 30 steps')")
            wait_for(browser, f"return document.querySelector('output').textContent.endsWith('step {steps}')")
        make_run(folder.path)
        wait_for(browser, "return document.querySelector('h1').textContent.startsWith('Better')")
        assert browser.run("return window.stayed") is True
        assert browser.console() == []
        assert set(browser.requests()) == {url}
        assert browser.run(MISSING_CURVES) == []
    finally:
        server.shutdown()
        server.server_close()


def wait_for(browser: Browser, condition: str) -> None:
    end = time.monotonic() + 20
    while not browser.run(condition):
        assert time.monotonic() < end, condition
        time.sleep(0.1)
