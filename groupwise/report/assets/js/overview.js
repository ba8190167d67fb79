/* What came of it. */

const interval = (point) => `${percent(point.accuracy)} (${percent(point.low)} to ${percent(point.high)})`;

function headline(run) {
  const { points } = run.evals;
  if (points.length > 1) {
    const first = points[0], last = points.at(-1), best = points.reduce((a, b) => (b.accuracy > a.accuracy ? b : a));
    const words = [`Accuracy ${interval(first)} after step ${first.step}, ${interval(last)} after step ${last.step}`];
    if (best.step !== last.step) words.push(`at its best ${percent(best.accuracy)} after step ${best.step}`);
    return `${words.join("; ")}.`;
  }
  const rewards = run.points("reward");
  if (rewards.length > 1) return `Reward ${number(rewards[0][1], 3)} in step ${rewards[0][0]}, ${number(rewards.at(-1)[1], 3)} in step ${rewards.at(-1)[0]}.`;
  return rewards.length || run.metrics.steps.length ? "One step so far." : "No step yet.";
}

function findingsOf(run) {
  const { findings } = run.facts;
  if (!findings.length) return el("p", { className: "quiet", textContent: "The doctor found nothing." });
  return el("ul", { className: "findings" }, findings.map((finding) => el("li", {},
    el("strong", { textContent: `step ${finding.step}, ${finding.rule}: ` }), shown(String(finding.seen ?? "")),
    finding.helps ? el("div", { className: "quiet", textContent: `What usually helps: ${finding.helps}` }) : null)));
}

function tile(name, value) {
  return el("div", { className: "tile" }, el("div", { className: "value", textContent: value }), el("div", { className: "quiet", textContent: name }));
}

function overviewOf(page, run) {
  const { facts } = run, steps = facts.of_steps === null ? String(facts.steps) : `${facts.steps} of ${facts.of_steps}`;
  const rewards = run.points("reward"), speed = run.points("throughput/tokens_per_second");
  return el("article", { className: "run" },
    page.runs.length > 1 ? el("h2", {}, swatch(run.index), shown(run.name)) : null,
    el("p", { className: "headline" }, shown(headline(run))),
    facts.problem ? el("p", { className: "warning" }, shown(facts.problem)) : null,
    el("div", { className: "tiles" },
      tile("state", facts.state), tile("steps", steps), tile("time", duration(facts.seconds)),
      tile("reward of the last step", rewards.length ? number(rewards.at(-1)[1], 3) : "–"),
      tile("tokens per second, last step", speed.length ? thousands(speed.at(-1)[1]) : "–"),
      tile("samples", thousands(run.groups.rewards.length || facts.ledger.samples)),
      tile("prompts", thousands(new Set(run.groups.uid).size || facts.ledger.prompts))),
    el("h3", { textContent: "Findings" }), findingsOf(run),
    run.damaged ? el("p", { className: "warning", textContent: `${plural(run.damaged, "line")} of its trajectories cannot be read.` }) : null,
    facts.warnings.length ? el("details", {}, el("summary", { textContent: plural(facts.warnings.length, "warning") }),
      el("pre", {}, shown(facts.warnings.join("\n")))) : null);
}

const swatch = (index) => el("span", { className: "swatch", "aria-hidden": "true", style: { background: COLOURS[index % COLOURS.length] } });

class Overview {
  name = "Overview";
  constructor(page) { this.page = page; }

  draw(box) {
    this.charts = [];
    const panels = ["Reward", "Accuracy"].map((title) => PANELS.find((panel) => panel.title === title))
      .map((panel) => panelOf(this.page, panel)).filter(Boolean);
    this.charts = panels;
    fill(box, this.page.runs.map((run) => overviewOf(this.page, run)), el("div", { className: "panels" }, panels.map((chart) => chart.node)));
    for (const chart of panels) chart.fit();
  }

  refresh(box) { this.draw(box); }
  fit() { for (const chart of this.charts ?? []) chart.fit(); }
}
