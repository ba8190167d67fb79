/* Curves by uPlot: raw values pale, their running mean strong; drag to zoom, double click for all. */

const COLOURS = ["#3b7dd8", "#d9822b", "#2f9e62", "#b5479b", "#8b6fd1", "#c2483d", "#5f8a8b", "#9a8a2b"];

const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

/** Means over the last `width` values that there are. */
function smoothed(values, width) {
  if (width <= 1) return values;
  const window = [];
  return values.map((value) => {
    if (value === null || value === undefined) return null;
    window.push(value);
    if (window.length > width) window.shift();
    return mean(window);
  });
}

/** Lines over a common axis of steps. `lines`: `{label, points: [[step, value]], colour, band?: [[step, low, high]], dots}`. */
function aligned(lines) {
  const steps = [...new Set(lines.flatMap((line) => line.points.map(([step]) => step)))].sort((a, b) => a - b);
  const place = new Map(steps.map((step, i) => [step, i]));
  const spread = (pairs) => {
    const values = new Array(steps.length).fill(null);
    for (const [step, value] of pairs) values[place.get(step)] = value;
    return values;
  };
  return { steps, columns: lines.map((line) => spread(line.points)), bands: lines.map((line) => line.band
    ? [spread(line.band.map(([step, low]) => [step, low])), spread(line.band.map(([step, , high]) => [step, high]))] : null) };
}

function series(lines, data, width) {
  const values = [data.steps], described = [{ label: "step" }], bands = [], silent = [];
  lines.forEach((line, i) => {
    const few = line.dots || data.columns[i].filter((value) => value !== null).length < 2;
    if (data.bands[i]) {
      values.push(data.bands[i][1], data.bands[i][0]);
      const edge = { stroke: "transparent", points: { show: false }, spanGaps: true };
      described.push(edge, { ...edge });
      bands.push({ series: [values.length - 2, values.length - 1], fill: `${line.colour}33` });
      silent.push(values.length - 2, values.length - 1);
    }
    const raw = { label: line.label, stroke: line.colour, dash: line.dash ?? [], spanGaps: true, value: (_, v) => number(v) };
    if (few || width <= 1) {
      values.push(data.columns[i]);
      described.push({ ...raw, width: 1.6, points: { show: few, size: 6 } });
      return;
    }
    values.push(data.columns[i], smoothed(data.columns[i], width));
    described.push({ ...raw, alpha: 0.35, width: 1, points: { show: false } }, { ...raw, width: 2, points: { show: false } });
    silent.push(values.length - 1);
  });
  return { values, described, bands, silent };
}

/** A chart with its words for who cannot see it, and its values as a table. */
class Chart {
  constructor({ title, note, lines, smooth, step }) {
    this.title = title;
    this.step = step;
    this.box = el("div", { className: "plot" });
    this.words = el("p", { className: "unseen" });
    this.more = el("details", { className: "values", on: { toggle: () => this.more.open && this.#tabulate() } },
      el("summary", { textContent: "values" }), el("div"));
    this.node = el("section", { className: "panel", "aria-label": title },
      el("h3", {}, title, note ? el("span", { className: "note", textContent: note }) : null), this.words, this.box, this.more);
    this.draw(lines, smooth);
  }

  draw(lines, smooth) {
    this.lines = lines.filter((line) => line.points.length);
    this.smooth = smooth;
    this.words.textContent = this.lines.map((line) => {
      const [low, high] = extent(line.points.map(([, value]) => value)), first = line.points[0], last = line.points.at(-1);
      return `${line.label}: ${number(first[1])} at step ${first[0]}, ${number(last[1])} at step ${last[0]}, `
        + `between ${number(low)} and ${number(high)}.`;
    }).join(" ");
    this.#plot();
    if (this.more.open) this.#tabulate();
  }

  #plot() {
    const zoom = this.plot && this.zoomed ? { min: this.plot.scales.x.min, max: this.plot.scales.x.max } : null;
    this.plot?.destroy();
    const { values, described, bands, silent } = series(this.lines, aligned(this.lines), this.smooth);
    const axis = { stroke: css("--quiet"), grid: { stroke: css("--line"), width: 1 }, ticks: { stroke: css("--line") }, font: "11px system-ui" };
    const options = {
      width: Math.max(200, this.box.clientWidth || 480), height: 190, series: described, bands,
      scales: { x: { time: false }, y: { range: (_, low, high) => (low === null ? [0, 1] : low === high
        ? [low - (Math.abs(low) * 0.1 || 1), high + (Math.abs(high) * 0.1 || 1)] : uPlot.rangeNum(low, high, 0.1, true)) } },
      axes: [{ ...axis, size: 28 }, { ...axis, size: 54, values: (_, splits) => splits.map((value) => number(value)) }],
      cursor: { sync: { key: "steps" }, drag: { x: true, y: false } },
      legend: { live: true },
      hooks: { init: [(plot) => {
        const rows = plot.root.querySelectorAll(".u-series");
        for (const i of silent) rows[i].hidden = true;
      }], setScale: [(plot, key) => {
        if (key === "x") this.zoomed = plot.scales.x.min > plot.data[0][0] || plot.scales.x.max < plot.data[0].at(-1);
      }] },
    };
    this.plot = new uPlot(options, values, this.box);
    if (zoom) this.plot.setScale("x", zoom);
    if (this.step) {
      this.plot.over.title = "click: this step's samples; drag: zoom; double click: all";
      this.plot.over.addEventListener("click", () => {
        const at = this.plot.cursor.idx;
        if (this.plot.select.width === 0 && at !== null && at !== undefined) this.step(this.plot.data[0][at]);
      });
    }
  }

  /** Fit the width that there is now; colours of the theme. */
  fit() {
    if (this.box.clientWidth && this.plot) this.#plot();
  }

  #tabulate() {
    const { steps, columns } = aligned(this.lines);
    const rows = steps.map((step, i) => [String(step), ...columns.map((column) => number(column[i], 6))]).slice(-1000);
    fill(this.more.lastChild, table(this.title, ["step", ...this.lines.map((line) => line.label)], rows, "short"));
  }
}

/** Bars of a histogram, with its counts in words. */
function histogram(title, values, bins = 24) {
  const known = values.filter((value) => value !== null);
  if (!known.length) return el("p", { className: "quiet", textContent: `${title}: none` });
  const [low, high] = extent(known), counts = new Array(bins).fill(0);
  for (const value of known) counts[high === low ? 0 : Math.min(bins - 1, Math.floor(((value - low) / (high - low)) * bins))] += 1;
  const most = Math.max(...counts), edge = (i) => low + ((high - low) * i) / bins;
  const bars = counts.map((count, i) => svg("rect", { x: i * 10 + 0.5, y: 60 - (58 * count) / most, width: 9, height: (58 * count) / most },
    svg("title", {}, `${number(edge(i))} to ${number(edge(i + 1))}: ${count}`)));
  const words = `${title}: ${plural(known.length, "sample")}, mean ${number(mean(known))}, from ${number(low)} to ${number(high)}`;
  return el("figure", { className: "histogram" }, el("figcaption", { textContent: words }),
    svg("svg", { viewBox: `0 0 ${bins * 10} 62`, preserveAspectRatio: "none", role: "img", "aria-label": words }, ...bars),
    el("div", { className: "ends" }, el("span", { textContent: number(low) }), el("span", { textContent: number(high) })));
}
