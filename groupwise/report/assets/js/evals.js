/* Evaluations row by row; and two runs compared. */

const CHANGES = {
  right: ["became right", (a, b) => a !== null && b !== null && b > a], wrong: ["became wrong", (a, b) => a !== null && b !== null && b < a],
  part: ["right in part, as before", (a, b) => a !== null && a === b && a > 0 && a < 1],
  never: ["still wrong", (a, b) => a === b && a === 0], always: ["still right", (a, b) => a === b && a === 1],
  all: ["all rows", () => true],
};

class Evaluations {
  name = "Evaluations";
  constructor(page) {
    this.page = page;
    this.run = 0;
    this.kind = "right";
    this.text = "";
    this.at = 0;
  }

  draw(box) {
    this.box = box;
    const { page } = this, run = page.runs[this.run], { points } = run.evals;
    const runs = page.runs.length > 1 ? select("run", page.runs.map((each, i) => [i, each.name]), this.run, (value) => {
      this.run = Number(value);
      this.draw(box);
    }) : null;
    if (!points.length) {
      fill(box, el("div", { className: "tools" }, runs), el("p", { className: "quiet", textContent: "This run has kept no evaluation's rows." }), this.#compared());
      return;
    }
    const steps = points.map((point) => point.step), last = points.length - 1;
    this.pair = (this.pair ?? [0, last]).map((at) => Math.min(at, last));
    const options = steps.map((step, i) => [i, `step ${step}: ${percent(points[i].accuracy)}`]);
    this.rows = el("div", { className: "list" });
    this.detail = el("div", { className: "detail", tabIndex: -1 });
    this.counts = el("p", { role: "status" });
    const choose = (which) => (value) => { this.pair[which] = Number(value); this.at = 0; this.#list(); };
    fill(box,
      el("div", { className: "tools" }, runs, select("from", options, this.pair[0], choose(0)), select("to", options, this.pair[1], choose(1)),
        select("show", Object.entries(CHANGES).map(([key, [name]]) => [key, name]), this.kind, (value) => { this.kind = value; this.at = 0; this.#list(); }),
        el("label", { className: "field" }, el("span", { textContent: "text" }), el("input", { type: "search", value: this.text,
          on: { input: later(200, (event) => { this.text = event.target.value.trim().toLowerCase(); this.at = 0; this.#list(); }) } }))),
      run.evals.problems.map((problem) => el("p", { className: "warning" }, shown(problem))),
      this.counts, el("div", { className: "two" }, this.rows, this.detail));
    box.prepend(...this.#compared());
    this.#list();
  }

  #list() {
    const { evals } = this.page.runs[this.run], [a, b] = this.pair, before = evals.right[a], after = evals.right[b];
    const count = (key) => evals.uids.reduce((sum, _, i) => sum + (CHANGES[key][1](before[i], after[i]) ? 1 : 0), 0);
    const parts = count("part"), alone = evals.uids.filter((_, i) => (before[i] === null) !== (after[i] === null)).length;
    this.counts.textContent = `From step ${evals.points[a].step} to ${evals.points[b].step}: ${plural(count("right"), "row")} became right, `
      + `${count("wrong")} became wrong, ${count("always")} stayed right, ${count("never")} stayed wrong`
      + (parts ? `, ${parts} stayed right in part` : "") + (alone ? `; ${alone} not in both.` : ".");
    const chosen = evals.uids.map((_, i) => i).filter((i) => CHANGES[this.kind][1](before[i], after[i])
      && (evals.labels[i].toLowerCase().includes(this.text) || evals.uids[i].toLowerCase().includes(this.text)));
    const pages = Math.max(1, Math.ceil(chosen.length / PER_PAGE));
    this.at = Math.min(this.at, pages - 1);
    const rows = chosen.slice(this.at * PER_PAGE, (this.at + 1) * PER_PAGE);
    const turn = (by) => { this.at += by; this.#list(); };
    const list = table("rows", ["over training", "row"], rows.map((i) => [
      el("span", { className: "history", role: "img", "aria-label": evals.right.map((column, k) => `step ${evals.points[k].step}: ${percent(column[i], 0)}`).join(", ") },
        evals.right.map((column) => el("span", { className: column[i] === null ? "none" : column[i] === 1 ? "right" : column[i] === 0 ? "wrong" : "part" }))),
      button("", () => this.#show(i), { className: "link prompt", dataset: { row: i } })]), "groups");
    list.querySelectorAll("button.prompt").forEach((node, n) => fill(node, shown(evals.labels[rows[n]] || evals.uids[rows[n]])));
    fill(this.rows, el("div", { className: "pages" }, el("span", { textContent: plural(chosen.length, "row") }),
      button("‹", () => turn(-1), { disabled: this.at === 0, "aria-label": "rows before" }), el("span", { textContent: `${this.at + 1} / ${pages}` }),
      button("›", () => turn(1), { disabled: this.at >= pages - 1, "aria-label": "rows behind" })), list);
  }

  async #show(i) {
    const { evals } = this.page.runs[this.run], found = await this.#answers(this.run, evals.uids[i]);
    fill(this.detail, found === null ? [el("p", {}, shown(evals.labels[i])), absent()]
      : [el("h3", {}, shown(evals.uids[i])), el("pre", { dir: "auto" }, long(found.prompt)),
        Object.entries(found.answers).sort(([x], [y]) => x - y).map(([step, answers]) => answers.map((answer) => answerCard(`step ${step}`, answer)))]);
    this.detail.focus({ preventScroll: true });
    if (this.detail.getBoundingClientRect().top > innerHeight) this.detail.scrollIntoView();
  }

  async #answers(run, uid) {
    try {
      return await this.page.source.answers(run, uid);
    } catch (error) {
      this.page.complain(error);
      return null;
    }
  }

  /** Others beside the first run, over the rows that both were asked. */
  #compared() {
    const { page } = this;
    return page.runs.slice(1).map((run, k) => {
      const found = page.compared[k], first = page.runs[0];
      const title = el("h2", {}, swatch(first.index), shown(first.name), " and ", swatch(run.index), shown(run.name));
      if (!found) return el("section", { className: "comparison" }, title, el("p", { className: "quiet", textContent: "They were not evaluated on the same rows." }));
      const words = `On the same ${plural(found.rows, "row")}: ${percent(found.accuracy[0])} (step ${found.steps[0]}) and ${percent(found.accuracy[1])} (step ${found.steps[1]}). `
        + `The second is better in ${found.better} rows and worse in ${found.worse}; exact sign test, two-sided: p = ${number(found.p, 3)}`
        + `${found.p < 0.05 ? "." : ": that may be chance."}`;
      const detail = el("div", { className: "detail" }), index = new Map(first.evals.uids.map((uid, i) => [uid, i]));
      const show = async (uid) => {
        const both = await Promise.all([this.#answers(0, uid), this.#answers(run.index, uid)]);
        fill(detail, el("h3", {}, shown(uid)), both[0] || both[1] ? el("pre", { dir: "auto" }, long((both[0] ?? both[1]).prompt)) : absent(),
          both.map((each, n) => (each?.answers[found.steps[n]] ?? []).map((answer) => answerCard([first, run][n].name, answer))));
      };
      const list = table("rows that differ", [first.name, run.name, "row"], found.differ.slice(0, 1000).map((row) => [
        percent(row.shares[0], 0), percent(row.shares[1], 0), button("", () => show(row.uid), { className: "link prompt" })]), "groups");
      list.querySelectorAll("button.prompt").forEach((node, n) => fill(node, shown(first.evals.labels[index.get(found.differ[n].uid)] || found.differ[n].uid)));
      return el("section", { className: "comparison" }, title, el("p", { className: "headline", textContent: words }), el("div", { className: "two" }, el("div", { className: "list" }, list), detail));
    });
  }

  refresh(box) { if (!this.detail?.childElementCount) this.draw(box); }
  fit() {}
}

const absent = () => el("p", { className: "quiet", textContent: "The page does not keep this row's answers; groupwise report --all does." });

const answerCard = (name, answer) => el("article", { className: `card ${answer.correct ? "right" : "wrong"}` },
  el("header", {}, el("b", {}, shown(name)), el("span", { className: "part", textContent: answer.correct ? "right" : "wrong" }),
    Object.entries(answer.rewards).map(([reward, value]) => el("span", { className: "part" }, shown(reward), ` ${number(value)}`)),
    el("span", { className: "part", textContent: plural(answer.tokens, "token") }), el("span", { className: "part", textContent: answer.finish === "length" ? "cut" : answer.finish })),
  answer.cause ? el("p", { className: "warning" }, shown(answer.cause)) : null,
  el("div", { className: "answer", dir: "auto" }, long(answer.text)));
