"use strict";
// Draws the page's plots with uPlot in the colours of the current theme, and shows the numbers at the pointer.
const report = (() => {
  const HEIGHT = 210;
  const SMOOTH_FROM = 60; // a loss with at least this many points also gets a smoothed line
  const drawn = new Map(); // key -> {plot, chart, box}
  const media = [matchMedia("(prefers-color-scheme: dark)"), matchMedia("print")];

  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const read = (page) => JSON.parse(page.getElementById("charts").textContent);

  const trimmed = (digits) => new Intl.NumberFormat("en", { maximumFractionDigits: digits });
  const forms = {
    loss: (v) => v.toFixed(v < 0.1 ? 4 : 3),
    scientific: (v) => (v === 0 ? "0" : v.toExponential(2)),
    short: (v) => trimmed(v >= 100 ? 0 : v >= 10 ? 1 : 3).format(v),
  };
  const ticks = {
    scientific: (u, values) => values.map((v) => (v === 0 ? "0" : v.toExponential(1).replace(".0e", "e"))),
  };

  // An exponential moving average, corrected for its start (as Adam's is). It shows the trend where the loss is noisy.
  function smoothed(values) {
    const weight = 0.9;
    let sum = 0, norm = 0;
    return values.map((v) => {
      if (v == null) return v;
      sum = weight * sum + (1 - weight) * v;
      norm = weight * norm + (1 - weight);
      return sum / norm;
    });
  }

  const isSmoothed = (chart) => chart.key === "loss" && chart.series.some((s) => s.x.length >= SMOOTH_FROM);

  function table(chart) {
    const columns = chart.series.map((s) => [s.x, s.y]);
    const lines = isSmoothed(chart) ? chart.series.map((s) => [s.x, smoothed(s.y)]) : [];
    return uPlot.join([...columns, ...lines]);
  }

  function line(series, faint) {
    const stroke = colour(`--run-${series.run % 8}`);
    const dash = series.run >= 8 ? [6, 4] : undefined;
    return { stroke, dash, width: faint ? 1 : 2, alpha: faint ? 0.35 : 1, points: { size: 5, fill: stroke } };
  }

  function axis(overrides) {
    return {
      stroke: colour("--quiet"),
      font: "12px system-ui, sans-serif",
      grid: { stroke: colour("--rule"), width: 1 },
      ticks: { show: false },
      ...overrides,
    };
  }

  function options(chart, width) {
    const smooth = isSmoothed(chart);
    const series = chart.series.map((s) => line(s, smooth));
    const over = smooth ? chart.series.map((s) => ({ ...line(s, false), points: { show: false } })) : [];
    const y = chart.fromZero ? { range: (u, low, high) => [0, high > 0 ? high * 1.08 : 1] } : {};
    return {
      width,
      height: HEIGHT,
      padding: [10, 8, 0, 0],
      legend: { show: false },
      cursor: { y: false, sync: { key: "steps" }, points: { size: 9 } },
      scales: { x: { time: false }, y },
      series: [{}, ...series, ...over],
      axes: [
        axis({ size: 30, gap: 6, incrs: [1, 2, 5, 10, 20, 50, 100, 200, 500, 1e3, 2e3, 5e3, 1e4, 2e4, 5e4, 1e5, 1e6] }),
        axis({
          gap: 6,
          values: ticks[chart.form],
          size: (u, values) => 14 + 7 * Math.max(3, ...(values || []).map((v) => String(v ?? "").length)),
        }),
      ],
      hooks: { setCursor: [(u) => readOut(chart, u)] },
    };
  }

  function piece(tag, text, className) {
    const made = document.createElement(tag);
    made.textContent = text;
    if (className) made.className = className;
    return made;
  }

  // Shows each run's value at the pointer's step, or its last value if the pointer is elsewhere.
  function readOut(chart, u) {
    const place = u.cursor.idx;
    const parts = [];
    let step = null;
    chart.series.forEach((s, i) => {
      const values = u.data[i + 1];
      let at = place;
      if (at == null) for (at = values.length - 1; at > 0 && values[at] == null; at--);
      if (values[at] == null) return;
      step = u.data[0][at];
      const part = piece("span", "", `run-${s.run % 8}`);
      if (chart.series.length > 1) part.append(piece("i", "", "swatch"));
      part.append(piece("b", forms[chart.form](values[at])));
      parts.push(part);
    });
    if (step != null && (place != null || chart.series.length === 1)) parts.push(piece("span", `step ${step}`, "step"));
    u.root.closest("figure").querySelector("output").replaceChildren(...parts);
  }

  function draw(chart, box) {
    drawn.get(chart.key)?.plot.destroy();
    box.replaceChildren();
    const plot = new uPlot(options(chart, box.clientWidth), table(chart), box);
    drawn.set(chart.key, { plot, chart, box });
    readOut(chart, plot);
  }

  const sizes = new ResizeObserver((entries) => {
    for (const { target } of entries) {
      const held = drawn.get(target.closest("figure").dataset.chart);
      if (held && target.clientWidth && held.plot.width !== target.clientWidth) {
        held.plot.setSize({ width: target.clientWidth, height: HEIGHT });
      }
    }
  });

  function onKey(event) {
    const turn = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    const held = drawn.get(event.currentTarget.closest("figure").dataset.chart);
    if (!turn || !held) return;
    event.preventDefault();
    const { plot } = held, steps = plot.data[0], last = steps.length - 1;
    const place = Math.min(last, Math.max(0, (plot.cursor.idx ?? last) + turn));
    plot.setCursor({ left: plot.valToPos(steps[place], "x"), top: 10 });
  }

  function drawAll(charts) {
    for (const { plot } of drawn.values()) plot.destroy();
    drawn.clear();
    sizes.disconnect();
    for (const chart of charts) {
      const box = document.querySelector(`figure[data-chart="${CSS.escape(chart.key)}"] .plot`);
      if (!box) continue;
      draw(chart, box);
      box.addEventListener("keydown", onKey);
      sizes.observe(box);
    }
  }

  // Gives new numbers to existing plots, and keeps zoom and pointer. A plot that gets a smoothed line is drawn again.
  function update(charts) {
    for (const chart of charts) {
      const held = drawn.get(chart.key);
      if (!held) continue;
      if (isSmoothed(chart) !== isSmoothed(held.chart) || chart.series.length !== held.chart.series.length) {
        draw(chart, held.box);
      } else {
        Object.assign(held.chart, chart);
        const { min, max } = held.plot.scales.x, steps = held.plot.data[0];
        const zoomed = min > steps[0] || max < steps[steps.length - 1];
        held.plot.setData(table(chart), !zoomed);
        readOut(held.chart, held.plot);
      }
    }
  }

  const again = () => drawAll([...drawn.values()].map((held) => held.chart));
  addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((one) => (one.open = true)));
  media.forEach((query) => query.addEventListener("change", again));
  drawAll(read(document));
  return { read, update, drawAll, keys: () => [...drawn.keys()] };
})();
