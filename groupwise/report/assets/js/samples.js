/* Every group of every step; one of them whole. */

const SORTS = {
  newest: ["newest step", (run, i) => -run.groups.step[i]], oldest: ["oldest step", (run, i) => run.groups.step[i]],
  spread: ["widest spread", (run, i) => -(run.spreads[i] ?? -1)], best: ["highest reward", (run, i) => -(run.means[i] ?? -Infinity)],
  worst: ["lowest reward", (run, i) => run.means[i] ?? Infinity], longest: ["longest", (run, i) => -(run.sizes[i] ?? -1)],
  shortest: ["shortest", (run, i) => run.sizes[i] ?? Infinity],
};

const KINDS = {
  all: ["all groups", () => true], differ: ["rewards differ", (run, i) => run.spreads[i] > 0],
  equal: ["rewards are equal", (run, i) => run.spreads[i] === 0],
  cut: ["an answer is cut", (run, i) => run.samples(i).ends.includes("length")],
  failed: ["a sample failed", (run, i) => run.samples(i).ends.includes("failed")],
};

const PER_PAGE = 50;

class Samples {
  name = "Samples";
  constructor(page) {
    this.page = page;
    this.run = 0;
    this.wanted = { text: "", sort: "newest", kind: "all", from: "", to: "", source: "" };
    this.at = 0;
    this.found = null;
    this.way = "plain";
  }

  get #run() { return this.page.runs[this.run]; }

  draw(box) {
    this.box = box;
    this.list = el("div", { className: "list" });
    this.detail = el("div", { className: "detail", tabIndex: -1 });
    const change = (name) => (value) => { this.wanted[name] = value; this.at = 0; this.#search(); };
    const sources = [...new Set(this.#run.groups.source)].sort();
    const field = (name, label, type, more = {}) => el("label", { className: "field" }, el("span", { textContent: label }),
      el("input", { type, value: this.wanted[name], ...more, on: { input: later(250, (event) => change(name)(event.target.value.trim())) } }));
    fill(box,
      el("div", { className: "tools" },
        this.page.runs.length > 1 ? select("run", this.page.runs.map((run, i) => [i, run.name]), this.run, (value) => {
          this.run = Number(value);
          this.at = 0;
          this.draw(box);
        }) : null,
        field("text", "text", "search", { placeholder: "in prompts and answers" }),
        select("sort", Object.entries(SORTS).map(([key, [name]]) => [key, name]), this.wanted.sort, change("sort")),
        select("show", Object.entries(KINDS).map(([key, [name]]) => [key, name]), this.wanted.kind, change("kind")),
        field("from", "steps from", "number", { min: 0, className: "short" }), field("to", "to", "number", { min: 0, className: "short" }),
        sources.length > 1 ? select("source", [["", "all"], ...sources.map((name) => [name, name])], this.wanted.source, change("source")) : null),
      this.page.rules[this.run] ? el("p", { className: "quiet rule", textContent: `${this.page.rules[this.run]}.` }) : null,
      el("div", { className: "two" }, this.list, this.detail));
    this.#search();
    if (this.open) this.show(...this.open);
  }

  async #search() {
    const run = this.#run, { text } = this.wanted, turn = (this.turn = (this.turn ?? 0) + 1);
    this.found = null;
    if (text) {
      fill(this.list, el("p", { className: "quiet", textContent: "searching …" }));
      try {
        this.found = await this.page.source.search(this.run, text.toLowerCase());
      } catch (error) {
        this.page.complain(error);
        return;
      }
      if (turn !== this.turn) return;
    }
    const low = text.toLowerCase(), { kind, sort, from, to, source } = this.wanted, order = SORTS[sort][1];
    const has = (i) => run.labels[run.groups.prompt[i]].toLowerCase().includes(low) || run.groups.uid[i].toLowerCase().includes(low)
      || this.found.has(`${run.groups.step[i]}/${run.groups.group[i]}`);
    const chosen = run.groups.step.map((_, i) => i).filter((i) => KINDS[kind][1](run, i)
      && (from === "" || run.groups.step[i] >= Number(from)) && (to === "" || run.groups.step[i] <= Number(to))
      && (source === "" || run.groups.source[i] === source) && (!low || has(i)));
    const keys = new Map(chosen.map((i) => [i, order(run, i)]));
    this.chosen = chosen.sort((a, b) => keys.get(a) - keys.get(b) || a - b);
    this.#list();
  }

  #list() {
    const run = this.#run, pages = Math.max(1, Math.ceil(this.chosen.length / PER_PAGE));
    this.at = Math.min(this.at, pages - 1);
    const rows = this.chosen.slice(this.at * PER_PAGE, (this.at + 1) * PER_PAGE);
    const turn = (by) => { this.at += by; this.#list(); };
    const groups = table("groups", ["step", "reward", "spread", "length", "rewards", "prompt"], rows.map((i) => [
      String(run.groups.step[i]), number(run.means[i], 3), number(run.spreads[i], 3), number(run.sizes[i], 3), marks(run.samples(i)),
      button("", () => this.show(this.run, i), { className: "link prompt", "aria-label": `group ${run.groups.group[i]} of step ${run.groups.step[i]}: ${run.labels[run.groups.prompt[i]]}`, dataset: { group: i } }),
    ]), "groups");
    groups.querySelectorAll("button.prompt").forEach((node, n) => fill(node, shown(run.labels[run.groups.prompt[rows[n]]] || run.groups.uid[rows[n]])));
    groups.querySelectorAll("tbody tr").forEach((row, n) => {
      row.addEventListener("click", () => this.show(this.run, rows[n]));
      if (this.open && this.open[0] === this.run && this.open[1] === rows[n]) row.classList.add("chosen");
    });
    fill(this.list, el("div", { className: "pages" },
      el("span", { role: "status", textContent: plural(this.chosen.length, "group") }),
      button("‹", () => turn(-1), { disabled: this.at === 0, "aria-label": "groups before" }),
      el("span", { textContent: `${this.at + 1} / ${pages}` }),
      button("›", () => turn(1), { disabled: this.at >= pages - 1, "aria-label": "groups behind" })), groups);
  }

  /** Open a group; where the page does not keep it, its numbers. */
  async show(which, i) {
    const run = this.page.runs[which];
    this.open = [which, i];
    this.page.remember();
    this.list.querySelectorAll("tr.chosen").forEach((row) => row.classList.remove("chosen"));
    this.list.querySelector(`[data-group="${i}"]`)?.closest("tr").classList.add("chosen");
    fill(this.detail, el("p", { className: "quiet", textContent: "opening …" }));
    let detail;
    try {
      detail = await this.page.source.group(which, run.groups.step[i], run.groups.group[i]);
    } catch (error) {
      fill(this.detail, el("p", { className: "warning", textContent: String(error.message) }));
      return;
    }
    if (this.open[1] !== i || this.open[0] !== which) return;
    fill(this.detail, detail === null ? this.#numbers(run, i) : this.#whole(run, i, detail));
    this.detail.focus({ preventScroll: true });
    if (this.detail.getBoundingClientRect().top > innerHeight) this.detail.scrollIntoView();
  }

  #title(run, i) {
    return [el("h3", {}, `Step ${run.groups.step[i]}, group ${run.groups.group[i]}`),
      el("p", { className: "quiet" }, shown(`${run.groups.uid[i]}${run.groups.source[i] ? `, ${run.groups.source[i]}` : ""}`)), this.#draws(run, i)];
  }

  /** The same prompt at other steps. */
  #draws(run, i) {
    const same = run.groups.uid.map((uid, j) => [uid, j]).filter(([uid]) => uid === run.groups.uid[i]).map(([, j]) => j);
    if (same.length < 2) return null;
    return el("div", { className: "draws" }, el("span", { className: "quiet", textContent: "this prompt over training: " }), same.map((j) =>
      button(`step ${run.groups.step[j]}: ${number(run.means[j], 3)}`, () => this.show(run.index, j), { "aria-pressed": String(j === i), className: "small" })));
  }

  #numbers(run, i) {
    const { rewards, lengths, ends } = run.samples(i);
    return [this.#title(run, i), el("p", {}, shown(run.labels[run.groups.prompt[i]])),
      el("p", { className: "quiet", textContent: "The page does not keep this group's texts; groupwise report --all does, and the run's trajectories/ has them." }),
      table("samples", ["sample", "reward", "tokens", "ended"], rewards.map((reward, n) => [String(n), number(reward), String(lengths[n]), ends[n]]))];
  }

  #whole(run, i, detail) {
    const cards = el("div", { className: "cards" }), about = el("div", { className: "about", role: "status" });
    const order = [...detail.samples].sort((a, b) => (b.reward ?? -Infinity) - (a.reward ?? -Infinity));
    const put = () => fill(cards, order.map((sample) => cardOf(sample, this.way, (lines, node) => tell(about, lines, node))));
    const ways = waysOf(detail);
    if (!ways.some(([key]) => key === this.way)) this.way = "plain";
    put();
    return [this.#title(run, i), el("details", { open: detail.prompt.length < 2000 }, el("summary", { textContent: "prompt" }), el("pre", { dir: "auto" }, long(detail.prompt))),
      el("div", { className: "tools" }, select("colour tokens by", ways, this.way, (value) => { this.way = value; put(); })), about, cards];
  }

  /** Groups of one step. */
  showStep(step) {
    Object.assign(this.wanted, { from: String(step), to: String(step), text: "", kind: "all" });
    this.at = 0;
  }

  refresh() { this.#search(); }
  fit() {}
}

/** What is known of a token, beside it: placed where the pointer is not. */
function tell(box, lines, node) {
  fill(box, lines.map(([name, value]) => el("span", { dataset: { about: name } }, el("b", { textContent: `${name} ` }), shown(value))));
  const at = node.getBoundingClientRect();
  box.classList.add("open");
  box.style.setProperty("top", `${at.bottom + 8 + box.offsetHeight > innerHeight ? at.top - box.offsetHeight - 8 : at.bottom + 8}px`);
  box.style.setProperty("left", `${Math.max(8, Math.min(at.left, innerWidth - box.offsetWidth - 8))}px`);
}

const untell = () => document.querySelector(".about.open")?.classList.remove("open");
addEventListener("scroll", untell, true);
addEventListener("pointerover", (event) => { if (!event.target.closest?.("[data-token]")) untell(); });

function cardOf(sample, way, told) {
  if (sample.problem) return el("article", { className: "card" }, el("p", { className: "warning" }, shown(`sample ${sample.index}: ${sample.problem}`)));
  const parts = Object.entries(sample.rewards).map(([name, value]) => el("span", { className: "part" }, shown(name), ` ${number(value, 4)}`));
  const head = el("header", {}, el("b", { className: "reward", textContent: number(sample.reward, 4) }),
    el("span", { className: "part", textContent: `advantage ${signed(sample.advantage, 4)}` }), parts,
    el("span", { className: "part", textContent: plural(sample.tokens, "token") }),
    el("span", { className: sample.finish === "length" ? "part cut" : "part", textContent: sample.finish === "length" ? "cut" : sample.finish }),
    sample.status === "ok" ? null : el("span", { className: "part failed", textContent: `failed${sample.boundary ? ` in its ${sample.boundary}` : ""}` }),
    el("span", { className: "quiet", textContent: `sample ${sample.index}` }));
  return el("article", { className: "card", dataset: { sample: sample.index } }, head,
    sample.cause ? el("p", { className: "warning" }, shown(sample.cause)) : null,
    sample.images.length ? el("p", { className: "quiet", textContent: `images: ${sample.images.join("; ")}` }) : null,
    way === "plain" ? plainView(sample) : tokenView(sample, way, told),
    said(sample));
}

/** What its environment said as messages, beside the text that the template made of them. */
function said(sample) {
  const messages = sample.segments.flatMap((segment) => segment.messages);
  return messages.length ? el("details", {}, el("summary", { textContent: plural(messages.length, "message of the environment", "messages of the environment") }),
    messages.map((message) => el("div", {}, el("b", {}, shown(message.role)), el("pre", { dir: "auto" }, long(message.content))))) : null;
}

/** A group's rewards as strokes: their height is the reward between the group's lowest and highest, or full. */
function marks({ rewards, ends }) {
  const [least, most] = extent(rewards.filter((value) => value !== null));
  const low = Math.min(0, least), high = Math.max(most, low + 1e-12);
  const shownRewards = rewards.slice(0, 32);
  return svg("svg", { class: "marks", viewBox: `0 0 ${shownRewards.length * 5} 16`, width: shownRewards.length * 5, height: 16, role: "img",
    "aria-label": `rewards ${rewards.map((value) => number(value, 3)).join(", ")}` },
  ...shownRewards.map((value, i) => {
    const height = value === null ? 2 : Math.max(1.5, (15 * (value - low)) / (high - low));
    return svg("rect", { x: i * 5, y: 16 - height, width: 4, height, class: ends[i] === "failed" ? "failed" : ends[i] === "length" ? "cut" : "" });
  }));
}
