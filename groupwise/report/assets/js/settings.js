/* What the runs are: settings with their origins, versions, the ledger, and the command that makes one again. */

class Settings {
  name = "Settings";
  constructor(page) {
    this.page = page;
    this.all = false;
    this.text = "";
  }

  draw(box) {
    this.list = el("div");
    fill(box,
      this.page.runs.length > 1 ? this.#differences() : null,
      el("h2", { textContent: "Settings" }),
      el("div", { className: "tools" },
        el("label", { className: "field" }, el("input", { type: "checkbox", checked: this.all, on: { change: (event) => { this.all = event.target.checked; this.#list(); } } }), el("span", { textContent: "those at their defaults, too" })),
        el("label", { className: "field" }, el("span", { textContent: "name or value" }), el("input", { type: "search", value: this.text, on: { input: later(150, (event) => { this.text = event.target.value.trim().toLowerCase(); this.#list(); }) } }))),
      this.list, this.page.runs.map((run) => this.#facts(run)));
    this.#list();
  }

  #rows(run) { return new Map(run.facts.settings.map(([name, ...rest]) => [name, rest])); }

  #differences() {
    const sides = this.page.runs.map((run) => this.#rows(run)), names = [...new Set(sides.flatMap((side) => [...side.keys()]))].sort();
    const differ = names.filter((name) => !/^(train\.output|tracking\.)/.test(name) && new Set(sides.map((side) => side.get(name)?.[0])).size > 1);
    return [el("h2", { textContent: "Where they differ" }), differ.length
      ? table("settings that differ", ["setting", ...this.page.runs.map((run) => run.name)], differ.map((name) => [name, ...sides.map((side) => side.get(name)?.[0] ?? "–")]), "left")
      : el("p", { className: "quiet", textContent: "In no setting." })];
  }

  #list() {
    const kept = (name, value, origin) => (this.all || origin !== "default") && `${name} ${value}`.toLowerCase().includes(this.text);
    fill(this.list, this.page.runs.map((run) => {
      const rows = run.facts.settings.filter(([name, value, , origin]) => kept(name, value, origin));
      return [this.page.runs.length > 1 ? el("h3", {}, swatch(run.index), shown(run.name)) : null,
        table(`settings of ${run.name}`, ["setting", "value", "default", "from"], rows.map(([name, value, plain, origin]) => [name, value, plain, origin]), "left")];
    }));
  }

  #facts(run) {
    const { facts } = run, { ledger } = facts, code = el("pre", { tabIndex: 0 }, shown(facts.command || "its config cannot be read"));
    const copy = button("copy", async () => {
      try {
        await navigator.clipboard.writeText(facts.command);
        copy.textContent = "copied";
      } catch {
        getSelection().selectAllChildren(code);
        copy.textContent = "selected";
      }
    });
    return el("section", {}, this.page.runs.length > 1 ? el("h2", {}, swatch(run.index), shown(run.name)) : null,
      el("h3", {}, "The command that makes it again ", copy), code,
      el("h3", { textContent: "Ledger" }),
      el("p", { textContent: `${plural(ledger.groups, "group")} of ${plural(ledger.prompts, "prompt")} with ${plural(ledger.samples, "sample")}; ${plural(ledger.learned, "group")} taught something.` }),
      el("h3", { textContent: "Versions" }),
      table("versions", ["what", "version"], Object.entries(facts.versions).map(([name, value]) => [name, value === null ? "not installed" : String(value)]), "left"),
      Object.keys(facts.summary).length ? [el("h3", { textContent: "Summary" }), el("pre", {}, shown(JSON.stringify(facts.summary, null, 2)))] : null,
      el("p", { className: "quiet" }, shown(facts.path)));
  }

  refresh() {}
  fit() {}
}
