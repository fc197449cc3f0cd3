"use strict";
// Draws a job's curves, and draws on when the job's part of the page was renewed.
(() => {
  const part = document.getElementById("job"), box = document.getElementById("plots");

  function frame(chart) {
    const figure = document.createElement("figure");
    figure.dataset.chart = chart.key;
    const caption = document.createElement("figcaption");
    caption.append(page.element("span", page.say(`chart.${chart.key}`), "title"), " ");
    caption.append(page.element("span", page.say("chart.unit"), "unit"), document.createElement("output"));
    const plot = page.element("div", "", "plot");
    plot.tabIndex = 0;
    plot.setAttribute("role", "img");
    plot.setAttribute("aria-label", page.say(`chart.${chart.key}`));
    figure.append(caption, plot);
    return figure;
  }

  function draw() {
    const charts = JSON.parse(part.querySelector("script.charts").textContent);
    document.getElementById("no-plots").hidden = charts.length > 0;
    if (charts.map((one) => one.key).join() === report.keys().join()) return report.update(charts);
    box.replaceChildren(...charts.map(frame));
    report.drawAll(charts);
  }

  part.addEventListener("renewed", draw);
  draw();
})();
