/* Making nodes. Whatever comes from a model or from data becomes text, never markup. */

/** A node with properties, listeners (`on`), attributes, and children: nodes or texts; null and false are left out. */
function el(tag, props = {}, ...children) {
  const node = document.createElement(tag);
  for (const [key, value] of Object.entries(props)) {
    if (value === null || value === undefined || value === false) continue;
    if (key === "on") for (const [name, listener] of Object.entries(value)) node.addEventListener(name, listener);
    else if (key === "style") for (const [name, given] of Object.entries(value)) node.style.setProperty(name, given);
    else if (key === "dataset") Object.assign(node.dataset, value);
    else if (key in node && !key.startsWith("aria")) node[key] = value;
    else node.setAttribute(key, value === true ? "" : String(value));
  }
  node.append(...children.flat(3).filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}

const fill = (node, ...children) => {
  node.replaceChildren(...children.flat(3).filter((child) => child !== null && child !== undefined && child !== false));
  return node;
};

/* What would turn or hide the text around it: bidirectional marks, zero widths, controls, halves of characters. */
const HIDDEN = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff]|[\ud800-\udbff](?![\udc00-\udfff])|(?<![\ud800-\udbff])[\udc00-\udfff]/;
const HIDDEN_PARTS = new RegExp(`(${HIDDEN.source})`);

/** The text as nodes; hidden characters are shown by their numbers. */
function shown(text) {
  if (!HIDDEN.test(text)) return [document.createTextNode(text)];
  return text.split(HIDDEN_PARTS).filter((part) => part !== "").map((part) => {
    if (!(part.length === 1 && HIDDEN.test(part))) return document.createTextNode(part);
    const code = `U+${part.charCodeAt(0).toString(16).toUpperCase().padStart(4, "0")}`;
    return el("span", { className: "hidden-char", title: `the character ${code}`, textContent: code });
  });
}

const svg = (tag, attributes, ...children) => {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
};

/** A table: a caption for readers of screens, names of columns, rows of cells (texts or nodes). */
function table(caption, head, rows, className = "") {
  const numeric = (cell) => typeof cell === "string" && /^[-+−]?[\d.,]+(e[-+]?\d+)?( ?%)?$/.test(cell);
  return el("div", { className: `wide ${className}`, tabIndex: 0, role: "region", "aria-label": caption },
    el("table", {},
      el("caption", { className: "unseen", textContent: caption }),
      el("thead", {}, el("tr", {}, head.map((name) => el("th", { scope: "col", textContent: name })))),
      el("tbody", {}, rows.map((cells) => el("tr", {}, cells.map((cell) =>
        el("td", { className: numeric(cell) ? "number" : null }, typeof cell === "string" ? shown(cell) : cell)))))));
}

const select = (label, options, value, change) => el("label", { className: "field" }, el("span", { textContent: label }),
  el("select", { on: { change: (event) => change(event.target.value) } }, options.map(([key, name]) =>
    el("option", { value: key, textContent: name, selected: String(key) === String(value) }))));

const button = (text, click, props = {}) => el("button", { type: "button", textContent: text, on: { click }, ...props });

const later = (wait, work) => {
  let timer = 0;
  return (...given) => { clearTimeout(timer); timer = setTimeout(() => work(...given), wait); };
};
