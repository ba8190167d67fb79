/* The page: a head, tabs, and, of a run that goes on, what is new every two seconds. */

class Page {
  constructor(source, head) {
    this.source = source;
    this.rules = head.rules;
    this.compared = head.compared;
    this.head = head;
    this.runs = head.runs.map((each, i) => new Run(i, each));
    this.smooth = Math.max(1, Math.min(10, Math.floor(extent(this.runs.map((run) => run.metrics.steps.length))[1] / 20)));
    this.views = [new Overview(this), new Curves(this), new Samples(this), new Evaluations(this), new Settings(this)];
    this.drawn = new Set();
    this.#frame();
  }

  #frame() {
    this.status = el("span", { className: "quiet", role: "status" });
    this.problem = el("p", { className: "warning", role: "alert", hidden: true });
    this.tabs = this.views.map((view, i) => el("button", { type: "button", role: "tab", id: `tab-${i}`, textContent: view.name, "aria-controls": `view-${i}`,
      on: { click: () => this.open(i), keydown: (event) => this.#key(event, i) } }));
    this.boxes = this.views.map((_, i) => el("section", { role: "tabpanel", id: `view-${i}`, "aria-labelledby": `tab-${i}`, hidden: true }));
    this.names = el("h1");
    fill(document.getElementById("app"),
      el("header", { className: "top" }, this.names, this.status, this.source.live ? this.#wishes() : null,
        button("light / dark", () => this.#theme(), { className: "small" })),
      this.problem, el("div", { role: "tablist", className: "tabs", "aria-label": "views" }, this.tabs), el("main", {}, this.boxes),
      el("footer", { className: "quiet", textContent: `Groupwise ${this.head.groupwise}, ${this.source.live ? "live" : `written ${this.head.made}`}; curves by uPlot, MIT licence` }));
    this.#title();
    addEventListener("resize", later(150, () => this.views[this.current].fit()));
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.#redraw());
    addEventListener("hashchange", () => this.#fromHash());
    this.#fromHash();
  }

  #title() {
    fill(this.names, this.runs.map((run, i) => [i ? " and " : null, this.runs.length > 1 ? swatch(i) : null, shown(run.name)]));
    const states = [...new Set(this.runs.map((run) => run.facts.state))].join(", ");
    this.status.textContent = this.source.live ? `${states}, read ${new Date().toLocaleTimeString()}` : states;
  }

  #key(event, i) {
    const to = { ArrowRight: i + 1, ArrowLeft: i - 1, Home: 0, End: this.views.length - 1 }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    const at = (to + this.views.length) % this.views.length;
    this.open(at);
    this.tabs[at].focus();
  }

  open(i) {
    this.current = i;
    this.tabs.forEach((tab, k) => { tab.setAttribute("aria-selected", String(k === i)); tab.tabIndex = k === i ? 0 : -1; });
    this.boxes.forEach((box, k) => { box.hidden = k !== i; });
    if (this.drawn.has(i)) this.views[i].fit();
    else this.views[i].draw(this.boxes[i]);
    this.drawn.add(i);
    this.remember();
  }

  /** The place where one is, in the address. */
  remember() {
    const samples = this.views[2].open, where = [this.views[this.current].name.toLowerCase()];
    if (this.current === 2 && samples) {
      const run = this.runs[samples[0]];
      where.push(samples[0], run.groups.step[samples[1]], run.groups.group[samples[1]]);
    }
    const hash = `#${where.join("/")}`;
    if (location.hash !== hash) history.replaceState(null, "", hash);
  }

  #fromHash() {
    const [name, run, step, group] = location.hash.slice(1).split("/");
    const at = Math.max(0, this.views.findIndex((view) => view.name.toLowerCase() === name));
    if (at === 2 && group !== undefined && this.runs[run]) {
      const { groups } = this.runs[run], i = groups.step.findIndex((each, k) => each === Number(step) && groups.group[k] === Number(group));
      if (i >= 0) {
        if (this.views[2].run !== Number(run)) this.drawn.delete(2);
        this.views[2].run = Number(run);
        this.views[2].open = [Number(run), i];
        if (this.drawn.has(2)) this.views[2].show(Number(run), i);
      }
    }
    this.open(at);
  }

  /** A step's samples, from a curve. */
  showStep(step) {
    this.views[2].showStep(step);
    this.drawn.delete(2);
    this.open(2);
  }

  #theme() {
    const dark = document.documentElement.dataset.theme ? document.documentElement.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    document.documentElement.dataset.theme = dark ? "light" : "dark";
    this.#redraw();
  }

  #redraw() {
    for (const i of this.drawn) this.views[i].fit();
  }

  complain(error) {
    this.problem.hidden = !error;
    this.problem.textContent = error ? String(error.message ?? error) : "";
  }

  /** What one may ask of a run that goes on. */
  #wishes() {
    const ask = (what, words) => button(words, async (event) => {
      const asked = event.target;
      if (what === "stop" && !confirm("Stop the run after its step, with a checkpoint?")) return;
      try {
        await this.source.ask(0, what);
        asked.textContent = "asked";
        setTimeout(() => { asked.textContent = words; }, 4000);
      } catch (error) {
        this.complain(error);
      }
    }, { className: "small wish", dataset: { wish: what } });
    return [ask("save", "ask for a checkpoint"), ask("stop", "stop after this step")];
  }

  async follow() {
    for (;;) {
      await new Promise((done) => setTimeout(done, 2000));
      if (document.hidden) continue;
      try {
        for (const run of this.runs) this.#take(run, await this.source.changes(run.index, run.known));
        this.complain(null);
      } catch (error) {
        this.complain(`not read since ${this.status.textContent}: ${error.message}`);
      }
    }
  }

  #take(run, found) {
    const before = JSON.stringify([run.known, run.facts.state, run.facts.findings.length]);
    if (found.anew) run.take(found);
    else run.add(found);
    this.#title();
    if (JSON.stringify([run.known, run.facts.state, run.facts.findings.length]) === before) return;
    if (found.anew) this.views[2].open = undefined;
    for (const i of this.drawn) {
      if (i === this.current) this.views[i].refresh(this.boxes[i]);
      else this.drawn.delete(i);
    }
  }
}

(async () => {
  const source = document.body.dataset.live === "yes" ? new Server() : new Inside();
  try {
    const page = new Page(source, await source.head());
    document.body.dataset.ready = "yes";
    if (source.live) page.follow();
  } catch (error) {
    fill(document.getElementById("app"), el("p", { className: "warning", textContent: `This page cannot be shown: ${error.message}. It needs a browser of 2023 or newer.` }));
    throw error;
  }
})();
