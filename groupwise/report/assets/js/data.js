/* Where the page has its data from: out of itself, or from the server that it came from. */

async function unpack(base64) {
  const bytes = Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return JSON.parse(await new Response(stream).text());
}

/** The parts that are inside the page. */
class Inside {
  live = false;
  #kept = new Map();

  #part(name) {
    return document.querySelector(`script[data-part="${name}"]`);
  }

  async #read(name) {
    if (this.#kept.has(name)) return this.#kept.get(name);
    const part = this.#part(name);
    const value = part === null ? null : await unpack(part.textContent);
    this.#kept.set(name, value);
    if (this.#kept.size > 40) this.#kept.delete(this.#kept.keys().next().value);
    return value;
  }

  async head() {
    const head = await unpack(this.#part("head").textContent);
    this.#part("head").remove();
    return head;
  }

  steps(run) {
    const names = document.querySelectorAll(`script[data-part^="groups/${run}/"]`);
    return [...names].map((part) => Number(part.dataset.part.split("/")[2]));
  }

  /** A group whole; null where the page does not keep it. */
  async group(run, step, group) {
    const found = await this.#read(`groups/${run}/${step}`);
    return (found ?? []).find((each) => each.group === group) ?? null;
  }

  /** Names `step/group` of the groups of which an answer has the text in it. */
  async search(run, text) {
    const found = new Set();
    for (const step of this.steps(run)) {
      for (const each of (await this.#read(`groups/${run}/${step}`)) ?? []) {
        const texts = [each.prompt, ...each.samples.map((sample) => sample.text ?? "")];
        if (texts.some((one) => one.toLowerCase().includes(text))) found.add(`${step}/${each.group}`);
      }
    }
    return found;
  }

  /** A row of evaluations with its answers; null where the page does not keep it. */
  async answers(run, uid) {
    return (await this.#read(`evals/${run}`))?.[uid] ?? null;
  }
}

/** The server of `groupwise watch`. */
class Server {
  live = true;
  #token = new URLSearchParams(location.search).get("token") ?? "";

  async #get(path, query = {}) {
    const parameters = new URLSearchParams({ ...query, token: this.#token });
    const answer = await fetch(`data/${path}?${parameters}`, { cache: "no-store" });
    if (!answer.ok) throw new Error(`the server answers ${answer.status}: ${(await answer.text()).slice(0, 200)}`);
    return answer.json();
  }

  head() { return this.#get("head"); }
  group(run, step, group) { return this.#get("group", { run, step, group }); }
  async search(run, text) { return new Set(await this.#get("search", { run, text })); }
  answers(run, uid) { return this.#get("answers", { run, uid }); }
  changes(run, known) { return this.#get("changes", { run, ...known }); }

  async ask(run, what) {
    const parameters = new URLSearchParams({ run, what, token: this.#token });
    const answer = await fetch(`ask?${parameters}`, { method: "POST" });
    if (!answer.ok) throw new Error((await answer.text()).slice(0, 200));
    return answer.json();
  }
}

/** What a page knows of one run. Groups are columns: `start[i]` is where the samples of group i begin. */
class Run {
  constructor(index, head) {
    this.index = index;
    this.take(head);
  }

  take(head) {
    this.generation = head.generation;
    this.metrics = { steps: [], columns: {} };
    this.groups = { step: [], group: [], uid: [], prompt: [], source: [], samples: [], rewards: [], lengths: [], ends: [] };
    this.labels = [];
    this.start = [];
    this.means = [];
    this.spreads = [];
    this.sizes = [];
    this.add(head);
  }

  add(head) {
    this.facts = head.facts;
    this.evals = head.evals ?? this.evals;
    this.damaged = head.damaged;
    this.#addMetrics(head.metrics);
    this.#addGroups(head.groups);
  }

  get name() { return this.facts.name; }

  get known() {
    return {
      generation: this.generation, steps: this.metrics.steps.length, groups: this.groups.step.length,
      samples: this.groups.rewards.length, evals: this.evals.version,
    };
  }

  #addMetrics({ steps, columns }) {
    const mine = this.metrics, before = mine.steps.length;
    for (const step of steps) mine.steps.push(step);
    for (const name of new Set([...Object.keys(mine.columns), ...Object.keys(columns)])) {
      mine.columns[name] ??= new Array(before).fill(null);
      for (let i = 0; i < steps.length; i += 1) mine.columns[name].push(columns[name]?.[i] ?? null);
    }
  }

  #addGroups(fresh) {
    const mine = this.groups;
    let at = mine.rewards.length, from = 0;
    for (const name of ["rewards", "lengths"]) for (const value of fresh[name]) mine[name].push(value);
    for (const end of fresh.ends) mine.ends.push(fresh.end_names[end]);
    for (let i = 0; i < fresh.step.length; i += 1) {
      const count = fresh.samples[i];
      for (const name of ["step", "group", "uid", "prompt", "source", "samples"]) mine[name].push(fresh[name][i]);
      this.start.push(at);
      const rewards = fresh.rewards.slice(from, from + count).filter((value) => value !== null);
      this.means.push(mean(rewards));
      const [low, high] = extent(rewards);
      this.spreads.push(rewards.length ? high - low : null);
      this.sizes.push(mean(fresh.lengths.slice(from, from + count)));
      at += count;
      from += count;
    }
    this.labels.length = fresh.first_prompt;
    for (const label of fresh.labels) this.labels.push(label);
  }

  /** Group i's samples: rewards, lengths, how they ended. */
  samples(i) {
    const from = this.start[i], to = from + this.groups.samples[i];
    return {
      rewards: this.groups.rewards.slice(from, to), lengths: this.groups.lengths.slice(from, to),
      ends: this.groups.ends.slice(from, to),
    };
  }

  column(name) { return this.metrics.columns[name] ?? null; }

  /** Values of a metric where it has one: `[[step, value], …]`. */
  points(name) {
    const values = this.column(name);
    return values === null ? [] : this.metrics.steps.map((step, i) => [step, values[i]]).filter(([, value]) => value !== null);
  }
}
