"""Debian's Chromium, driven over a page: what it logs, asks the network for, and shows."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

# The flags keep Chromium from talking to its maker; no sandbox, as tests may run as root.
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
)

# Text whose contrast with what lies behind it is under WCAG's AA (4.5, or 3 for large text).
LOW_CONTRAST = """
const rgb = (text) => (text.match(/[\\d.]+/g) || []).map(Number);
const light = ([r, g, b]) => [r, g, b].map((v) => v / 255)
  .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
  .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
const behind = (element) => {
  for (let e = element; e; e = e.parentElement) {
    const [r, g, b, alpha = 1] = rgb(getComputedStyle(e).backgroundColor);
    if (alpha === 1) return [r, g, b];
    if (alpha !== 0) throw new Error("a background that is partly seen through");
  }
  return [255, 255, 255];
};
const found = [];
for (const element of document.querySelectorAll("body *")) {
  const text = [...element.childNodes].filter((n) => n.nodeType === 3).map((n) => n.data.trim()).join("");
  if (!text || !element.checkVisibility() || element.matches("script, style, noscript")) continue;
  const style = getComputedStyle(element);
  const [one, two] = [light(rgb(style.color)), light(behind(element))].sort((a, b) => b - a);
  const ratio = (one + 0.05) / (two + 0.05);
  const large = parseFloat(style.fontSize) >= 24 || (parseFloat(style.fontSize) >= 18.66 && style.fontWeight >= 700);
  if (ratio < (large ? 3 : 4.5)) found.push([text.slice(0, 40), ratio]);
}
return found;
"""

# (plot, curve) pairs of which hardly a pixel is drawn in the curve's colour.
MISSING_CURVES = """
const inked = (canvas, run) => {
  const colour = getComputedStyle(document.documentElement).getPropertyValue(`--run-${run}`).trim();
  const [r, g, b] = [1, 3, 5].map((i) => parseInt(colour.slice(i, i + 2), 16));
  const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
  let count = 0;
  for (let i = 0; i < data.length; i += 4) {
    const away = Math.abs(data[i] - r) + Math.abs(data[i + 1] - g) + Math.abs(data[i + 2] - b);
    if (data[i + 3] > 200 && away < 12) count++;
  }
  return count;
};
return JSON.parse(document.getElementById("charts").textContent).flatMap((chart) => chart.series
  .filter((s) => inked(document.querySelector(`figure[data-chart="${chart.key}"] canvas`), s.run) < 20)
  .map((s) => [chart.key, s.name]));
"""


class Browser:
    """One tab of a Chromium that was started for the tests."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def open(self, url: str, theme: str = "light", width: int = 1280) -> None:
        """Load a page in a theme at a width in CSS pixels, and forget what was logged before."""
        self.driver.get("about:blank")
        media = {"features": [{"name": "prefers-color-scheme", "value": theme}]}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
        screen = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
        for kind in ("browser", "performance"):
            self.driver.get_log(kind)
        self.driver.get(url)

    def run(self, script: str) -> Any:
        return self.driver.execute_script(script)

    def console(self) -> list[str]:
        """What the page logged, errors and blocked requests among it."""
        return [line["message"] for line in self.driver.get_log("browser")]

    def requests(self) -> list[str]:
        """Every address asked for, but for those the page carries in itself."""
        messages = [json.loads(line["message"])["message"] for line in self.driver.get_log("performance")]
        sent = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
        return [url for url in sent if not url.startswith("data:")]

    def overflow(self) -> int:
        """CSS pixels by which the page is wider than the window."""
        return int(self.run("return document.documentElement.scrollWidth - document.documentElement.clientWidth"))


@contextmanager
def chromium(profile: Path) -> Iterator[Browser]:
    """A browser; the test is skipped where there is none."""
    programs = [shutil.which(name) for name in ("chromium", "chromedriver")]
    if None in programs:
        pytest.skip("no chromium and chromedriver on the path (Debian: chromium, chromium-driver)")
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = programs[0]
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(programs[1]))
    try:
        yield Browser(driver)
    finally:
        driver.quit()
