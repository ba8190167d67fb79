/* All numbers of all steps; several runs over each other. */

/* What belongs together: names, or a pattern of names. What no panel names has one of its own under "others". */
const PANELS = [
  { title: "Reward", names: ["reward"], note: "mean of a step's samples" },
  { title: "Accuracy", names: ["eval/accuracy"], note: "held-out rows, 95 % interval", accuracy: true },
  { title: "Rewards, each by itself", match: /^rewards\/(?!abandoned)[^/]+\/mean$/ },
  { title: "Rewards that failed", match: /^(rewards\/[^/]+\/errors|rollout\/failed)$/ },
  { title: "Spread of rewards in a group", names: ["reward_std"] },
  { title: "Shares of groups and answers", names: ["frac_reward_zero_std", "completions/clipped_ratio"], note: "groups with equal rewards, answers cut" },
  { title: "Length", match: /^completions\/(mean|max|min)_length$/, note: "tokens" },
  { title: "Loss", names: ["loss", "policy_loss"] },
  { title: "Entropy", match: /^(entropy|entropy\/.*)$/ },
  { title: "KL", match: /^(kl|kl\/.*|approx_kl)$/ },
  { title: "Mismatch of sampler and trainer", match: /^sampling\/sampling_logp_difference\/(mean|max)$/ },
  { title: "Clipped tokens", match: /^clip_ratio\//, note: "shares" },
  { title: "Gradient's norm", names: ["grad_norm"] },
  { title: "Learning rate", names: ["learning_rate"] },
  { title: "Time by phase", match: /^time\//, note: "seconds" },
  { title: "Tokens per second", match: /^throughput\// },
  { title: "Memory", match: /memory/ },
];

const DASHES = [[], [7, 4], [2, 3], [10, 3, 2, 3]];

const namesOf = (panel, known) => known.filter((name) => panel.names?.includes(name) || panel.match?.test(name));

const knownNames = (page) => [...new Set(page.runs.flatMap((run) => Object.keys(run.metrics.columns)))];

/** The lines of a panel: by run where there are several, else by metric. */
function linesOf(page, panel, known) {
  const names = namesOf(panel, known), lines = [];
  page.runs.forEach((run) => names.forEach((name) => {
    const label = [page.runs.length > 1 ? run.name : null, names.length > 1 || page.runs.length === 1 ? name : null].filter(Boolean).join(": ");
    const points = run.points(name);
    if (!points.length) return;
    const line = { label, points, colour: COLOURS[lines.length % COLOURS.length] };
    if (page.runs.length > 1) {
      line.colour = COLOURS[run.index % COLOURS.length];
      line.dash = DASHES[names.indexOf(name) % DASHES.length];
    }
    if (panel.accuracy) {
      line.dots = true;
      line.band = run.evals.points.map((point) => [point.step, point.low, point.high]).filter(([step]) => points.some(([at]) => at === step));
      if (!line.band.length) delete line.band;
    }
    lines.push(line);
  }));
  return lines;
}

function panelOf(page, panel) {
  const lines = linesOf(page, panel, knownNames(page));
  if (!lines.length) return null;
  const chart = new Chart({ title: panel.title, note: panel.note, lines, smooth: page.smooth, step: (step) => page.showStep(step) });
  chart.panel = panel;
  return chart;
}

class Curves {
  name = "Curves";
  constructor(page) { this.page = page; }

  draw(box) {
    const { page } = this, known = knownNames(page);
    const named = new Set(PANELS.flatMap((panel) => namesOf(panel, known)));
    this.charts = PANELS.map((panel) => panelOf(page, panel)).filter(Boolean);
    const others = known.filter((name) => !named.has(name)).sort();
    const value = el("output", { textContent: String(page.smooth) });
    const slide = later(80, () => this.refresh());
    const smooth = el("label", { className: "field" }, el("span", { textContent: "mean over steps" }),
      el("input", { type: "range", min: 1, max: 50, value: page.smooth, on: { input: (event) => {
        page.smooth = Number(event.target.value);
        value.textContent = String(page.smooth);
        slide();
      } } }), value);
    const more = el("details", { className: "others", on: { toggle: () => more.open && this.#drawOthers(others, more.lastChild) } },
      el("summary", { textContent: `${plural(others.length, "other number")}` }), el("div"));
    fill(box,
      el("div", { className: "tools" }, smooth, el("span", { className: "quiet", textContent: "Drag to zoom, double click for all; a click shows that step's samples." })),
      el("div", { className: "panels" }, this.charts.map((chart) => chart.node)), others.length ? more : null,
      this.page.runs.map((run) => spreadOf(page, run)));
    this.fit();
  }

  #drawOthers(names, box) {
    if (box.childElementCount) return;
    const list = el("div", { className: "panels" });
    const filter = el("input", { type: "search", placeholder: "name", "aria-label": "names of numbers", on: { input: later(150, () => put(filter.value)) } });
    const put = (part) => {
      this.charts = this.charts.filter((chart) => !chart.other);
      const charts = names.filter((name) => name.includes(part)).slice(0, 60)
        .map((name) => panelOf(this.page, { title: name, names: [name] })).filter(Boolean);
      for (const chart of charts) chart.other = true;
      this.charts.push(...charts);
      fill(list, charts.map((chart) => chart.node));
      for (const chart of charts) chart.fit();
    };
    fill(box, filter, list);
    put("");
  }

  refresh() {
    const known = knownNames(this.page);
    for (const chart of this.charts ?? []) chart.draw(linesOf(this.page, chart.panel, known), this.page.smooth);
  }

  fit() { for (const chart of this.charts ?? []) chart.fit(); }
}

/** Rewards and lengths of one step's samples, or of all. */
function spreadOf(page, run) {
  const steps = [...new Set(run.groups.step)];
  if (!steps.length) return null;
  const box = el("div", { className: "panels" }), out = el("output");
  const put = (at) => {
    const step = at === 0 ? null : steps[at - 1], rewards = [], lengths = [];
    for (let i = 0; i < run.groups.step.length; i += 1) {
      if (step !== null && run.groups.step[i] !== step) continue;
      const samples = run.samples(i);
      for (const reward of samples.rewards) rewards.push(reward);
      for (const length of samples.lengths) lengths.push(length);
    }
    out.textContent = step === null ? "all steps" : `step ${step}`;
    fill(box, histogram("Rewards", rewards), histogram("Lengths in tokens", lengths));
  };
  const slider = el("input", { type: "range", min: 0, max: steps.length, value: steps.length, "aria-label": "step; 0: all", on: { input: (event) => put(Number(event.target.value)) } });
  put(steps.length);
  return el("section", { className: "spread" }, el("h3", {}, page.runs.length > 1 ? [swatch(run.index), shown(`${run.name}: `)] : null, "Distributions"),
    el("div", { className: "tools" }, el("label", { className: "field" }, el("span", { textContent: "of" }), slider, out)), box);
}
