"use strict";
// Asks this page's own server for the page every two seconds, and replaces the parts that changed. It does not reload.
(() => {
  const EVERY = 2000, AFTER_FAILURE = 10000;
  const served = new Map();
  const parts = () => document.querySelectorAll("[data-part]");
  const say = (text) => {
    const line = document.getElementById("live");
    if (line.textContent !== text) line.textContent = text;
  };

  function takeOver(fresh) {
    for (const part of parts()) {
      const next = fresh.querySelector(`[data-part="${part.dataset.part}"]`);
      if (!next || next.innerHTML === served.get(part.dataset.part)) continue;
      served.set(part.dataset.part, next.innerHTML);
      part.replaceChildren(...next.childNodes);
    }
    const charts = report.read(fresh), keys = charts.filter((c) => c.series.length).map((c) => c.key);
    document.getElementById("charts").textContent = fresh.getElementById("charts").textContent;
    if (keys.join() === report.keys().join()) return report.update(charts);
    document.getElementById("training").replaceChildren(...fresh.getElementById("training").childNodes);
    report.drawAll(charts);
  }

  async function ask() {
    let wait = EVERY;
    try {
      const answer = await fetch(location.pathname, { cache: "no-store" });
      const text = await answer.text();
      if (answer.ok) {
        takeOver(new DOMParser().parseFromString(text, "text/html"));
        say(`Live: last update at ${new Date().toLocaleTimeString()}. This page updates itself.`);
      } else {
        say(text);
        wait = AFTER_FAILURE;
      }
    } catch {
      say("The server of this page has ended. It shows its last update.");
      wait = AFTER_FAILURE;
    }
    setTimeout(ask, wait);
  }

  for (const part of parts()) served.set(part.dataset.part, part.innerHTML);
  say("Live: this page updates itself.");
  setTimeout(ask, EVERY);
})();
