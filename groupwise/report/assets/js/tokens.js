/* An answer's tokens, coloured by a number of each, with all of its numbers under the pointer. */

const WAYS = [
  ["plain", "text"], ["logprob", "log-prob of the sampler"], ["credit", "credit"],
];

/** The ways in which this group's tokens can be coloured: gaps to what else gave log-probs, the trainer first of all. */
function waysOf(detail) {
  const scorers = new Set(detail.samples.flatMap((sample) => Object.keys(sample.scores ?? {})));
  return [...WAYS, ...[...scorers].map((name) => [`gap:${name}`, name === "policy" ? "gap between sampler and trainer" : `gap to ${name}`])];
}

/** The number that colours token i; null where it has none. */
function valueOf(sample, way, i) {
  if (way === "logprob") return sample.logprobs[i];
  if (way === "credit") return sample.credit === null ? sample.advantage : sample.credit[i];
  const scores = sample.scores[way.slice(4)];
  return scores && scores[i] !== null && sample.logprobs[i] !== null ? sample.logprobs[i] - scores[i] : null;
}

/** Strength −1 to 1: improbable tokens are −1; credits and gaps by the largest of the sample. */
function strengths(sample, way) {
  const values = sample.ids.map((_, i) => valueOf(sample, way, i));
  if (way === "logprob") return values.map((value) => (value === null ? 0 : Math.max(-1, value / 5)));
  const largest = values.reduce((most, value) => Math.max(most, Math.abs(value ?? 0)), 0) || 1;
  return values.map((value) => (value ?? 0) / largest);
}

/** Who wrote each token: `[T]` places of segments. */
function segmentsOf(sample) {
  return sample.segments.flatMap((segment, place) => new Array(segment.tokens).fill(place));
}

const tokenText = (sample, i) => (sample.pieces === null ? `‹${sample.ids[i]}›` : sample.pieces[i]);

function aboutToken(sample, i, segment) {
  const logprob = sample.logprobs[i], by = sample.segments[segment]?.by;
  const lines = [
    ["token", JSON.stringify(tokenText(sample, i))], ["number", String(sample.ids[i])], ["place", `${i + 1} of ${sample.ids.length}`],
  ];
  if (by === "environment") lines.push(["written by", "its environment"]);
  else lines.push(["log-prob", number(logprob, 5)], ["probability", logprob === null ? "–" : percent(Math.exp(logprob), 2)]);
  lines.push(["credit", number(valueOf(sample, "credit", i), 5)]);
  for (const [name, values] of Object.entries(sample.scores)) {
    lines.push([name === "policy" ? "trainer's log-prob" : name, number(values[i], 5)], [name === "policy" ? "gap to the trainer" : `gap to ${name}`, number(valueOf(sample, `gap:${name}`, i), 5)]);
  }
  const version = sample.versions.length > 1 ? sample.versions[i] : sample.versions[0];
  if (version !== undefined) lines.push(["weights", `version ${version}`]);
  return lines;
}

const MOST_TOKENS = 4000;

/** The answer as tokens. One of them can be chosen by pointer, focus and arrow keys; `tell(lines, node)` is told of it. */
function tokenView(sample, way, tell) {
  const view = el("div", { className: "answer tokens", tabIndex: 0, role: "group",
    "aria-label": "the answer's tokens; left and right go through them" });
  const segments = segmentsOf(sample), colours = way === "plain" ? null : strengths(sample, way);
  let chosen = -1, shownUpTo = 0;
  const choose = (i) => {
    if (i < 0 || i >= view.querySelectorAll("[data-token]").length) return;
    view.querySelector(".chosen")?.classList.remove("chosen");
    chosen = i;
    const node = view.querySelector(`[data-token="${i}"]`);
    node.classList.add("chosen");
    tell(aboutToken(sample, i, segments[i]), node);
  };
  const grow = () => {
    view.querySelector(".grow")?.remove();
    const end = Math.min(sample.ids.length, shownUpTo + MOST_TOKENS);
    const fresh = document.createDocumentFragment();
    for (let i = shownUpTo; i < end; i += 1) {
      const node = el("span", { className: "token", dataset: { token: i } }, tokenText(sample, i) ? shown(tokenText(sample, i))
        : el("span", { className: "hidden-char", title: "a part of the character behind it", textContent: "·" }));
      if (sample.segments[segments[i]]?.by === "environment") node.classList.add("environment");
      if (i > 0 && segments[i] !== segments[i - 1]) fresh.append(boundary(sample.segments[segments[i]]));
      if (colours) {
        const share = Math.round(Math.abs(colours[i]) * 70);
        if (share) node.style.background = `color-mix(in srgb, var(${colours[i] < 0 ? "--low" : "--high"}) ${share}%, transparent)`;
      }
      fresh.append(node);
    }
    shownUpTo = end;
    view.append(fresh);
    if (end < sample.ids.length) {
      view.append(button(`${plural(sample.ids.length - end, "more token")}`, grow, { className: "grow" }));
    }
  };
  grow();
  view.addEventListener("pointerover", (event) => {
    const token = event.target.closest("[data-token]");
    if (token) choose(Number(token.dataset.token));
  });
  view.addEventListener("keydown", (event) => {
    const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (by) { choose(chosen + by); event.preventDefault(); }
  });
  return view;
}

function boundary(segment) {
  const gave = segment.reward === null ? "" : `, reward ${number(segment.reward)}`;
  return el("span", { className: "boundary", textContent: segment.by === "environment" ? `environment${gave}` : `model${gave}` });
}

/** The answer as text, turn by turn. */
function plainView(sample) {
  let at = 0;
  const parts = sample.segments.map((segment, i) => {
    const text = sample.text.slice(at, at + segment.chars);
    at += segment.chars;
    const node = el("span", { className: segment.by === "environment" ? "environment" : null }, long(text));
    return i === 0 ? [node] : [boundary(segment), node];
  });
  return el("div", { className: "answer", dir: "auto", tabIndex: 0, role: "group", "aria-label": "the answer" },
    parts.length ? parts : el("em", { textContent: "nothing was written" }));
}

const MOST_CHARACTERS = 60000;

/** A text; of one that is very long the beginning, and the rest when asked. */
function long(text) {
  if (text.length <= MOST_CHARACTERS) return shown(text);
  const rest = el("span");
  const more = button(`${thousands(text.length - MOST_CHARACTERS)} more characters`, () => {
    fill(rest, shown(text.slice(MOST_CHARACTERS)));
    more.remove();
  });
  return [...shown(text.slice(0, MOST_CHARACTERS)), rest, more];
}
