// Elements of the page. Text becomes text nodes only: nothing here, or elsewhere, parses a string as HTML.

const SVG = "http://www.w3.org/2000/svg";

/** Return a new element with attributes (`on…` are listeners, null ones are left out) and children (texts, elements). */
function el(name, attributes = {}, ...children) {
  return fill(document.createElement(name), attributes, children);
}

function svg(name, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, name), attributes, children);
}

/** Return a text that may be broken after its dots and underscores, as the names of settings may. */
function breakable(text) {
  return text.split(/(?<=[._/=])/).flatMap((piece, i) => (i ? [el("wbr"), piece] : [piece]));
}

function fill(element, attributes, children) {
  for (const [key, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else element.setAttribute(key, value === true ? "" : value);
  }
  for (const child of children.flat(2)) {
    if (child !== null && child !== undefined) element.append(child);
  }
  return element;
}

/** Return a link to a place relative to the page; any other target, or a page without neighbours, gives plain text. */
function link(text, href) {
  const isRelative = typeof href === "string" && href.startsWith("./");
  return isRelative && !page.isLive ? el("a", { href }, text) : el("span", {}, text);
}

/** Format a number with four significant digits, and thousands separators where it is large. */
function formatNumber(value) {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-4 || size >= 1e9)) return value.toExponential(2).replace(/\.?0+e/, "e").replace("e+", "e");
  if (Number.isInteger(value)) return value.toLocaleString("en");
  if (size >= 1000) return value.toLocaleString("en", { maximumFractionDigits: 0 });
  return String(Number(value.toPrecision(4)));
}

/** Return the value of a custom property of the style sheet, such as --accent. */
function style(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

/** Return the colour of a curve by its place, from 0 (the best) to 1. */
function rankColour(rank) {
  if (rank === null || rank === undefined) return style("--unranked");
  const stops = [0, 1, 2, 3, 4].map((i) => style(`--rank-${i}`));
  const position = Math.min(0.9999, Math.max(0, rank)) * (stops.length - 1);
  const [from, to] = [Math.floor(position), Math.floor(position) + 1].map((i) => channels(stops[i]));
  const mixed = from.map((value, i) => Math.round(value + (to[i] - value) * (position % 1)));
  return `rgb(${mixed.join(",")})`;
}

function channels(hex) {
  return [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));
}

/** Return a section with a heading; `id` keeps its place and state when the page is drawn again. */
function section(part, ...children) {
  const id = part.id || part.kind;
  const heading = el("h2", { id: `${id}-title` }, part.title);
  const note = part.note ? part.note.split("\n").map((line) => el("p", { class: "note" }, line)) : null;
  return el("section", { class: `part ${part.kind}`, "aria-labelledby": `${id}-title` }, heading, note, ...children);
}
