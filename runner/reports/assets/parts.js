// The other parts of a page: figures, texts, bars, answers side by side, commands.

const SIGNS = {
  running: "▶", finished: "✓", stopped: "■", interrupted: "◌", failed: "✕", diverged: "↗", unknown: "?", "not started": "·", waiting: "·",
};

function stateBadge(state) {
  const known = state in SIGNS ? state.replace(" ", "-") : "unknown";
  return el("span", { class: `state ${known}` }, el("span", { "aria-hidden": "true", class: "sign" }, SIGNS[state] ?? "?"), state);
}

function factsPart(part) {
  if (!part.items.length) return null;
  return el("dl", { class: "facts" }, part.items.map((item) => el("div", {},
    el("dt", {}, item.label), el("dd", { class: item.value.length > 24 ? "long" : null }, item.value),
    item.remark ? el("dd", { class: "remark" }, item.remark) : null)));
}

function textPart(part) {
  const lines = part.code ? [el("pre", {}, part.lines.join("\n"))] : part.lines.map((line) => el("p", {}, line));
  const shown = section(part, lines);
  shown.classList.add(part.tone);
  return shown;
}

function barsPart(part) {
  const percent = (share) => `${Math.round(100 * share)} %`;
  const rows = part.items.map((item) => {
    const interval = item.low !== null ? ` (${Math.round(100 * item.low)}–${percent(item.high)})` : "";
    const bar = svg("svg", { viewBox: "0 0 100 16", preserveAspectRatio: "none", class: "bar", "aria-hidden": "true" },
      svg("rect", { x: 0, y: 2, width: 100, height: 12, class: "track" }),
      svg("rect", { x: 0, y: 2, width: 100 * item.share, height: 12, class: item.name === "the rest" ? "rest" : "share" }),
      item.low !== null ? svg("line", { x1: 100 * item.low, x2: 100 * item.high, y1: 8, y2: 8, class: "interval" }) : null);
    return el("tr", {}, el("th", { scope: "row", class: "code" }, item.name), el("td", { class: "bar-cell" }, bar),
      el("td", { class: "number" }, percent(item.share), el("span", { class: "interval-text" }, interval)), el("td", {}, item.text));
  });
  const titles = ["setting", "share", "in numbers", "how sure"].map((title) => el("th", { scope: "col" }, title));
  return section(part, el("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": `${part.title}: bars` },
    el("table", { class: "bars" }, el("thead", {}, el("tr", {}, titles)), el("tbody", {}, rows))));
}

const SHOWN_SAMPLES = 4;

function samplesPart(part) {
  const cards = part.items.map(sampleCard);
  const rest = cards.slice(SHOWN_SAMPLES);
  const more = rest.length
    ? el("details", { "data-open": part.id, open: page.state.open.has(part.id) }, el("summary", {}, `${rest.length} more`), rest)
    : null;
  return section(part, cards.slice(0, SHOWN_SAMPLES), more);
}

function sampleCard(item) {
  const answer = (label, content) => content && el("div", { class: "answer" },
    el("h3", {}, label, verdict(content.score)), el("pre", {}, content.text));
  return el("article", { class: "sample" },
    el("div", { class: "question" }, el("h3", {}, "prompt"), el("pre", {}, item.prompt),
      item.expected ? [el("h3", {}, "expected"), el("pre", {}, item.expected)] : null),
    el("div", { class: "answers" }, answer("before", item.before), answer("after", item.after)));
}

function verdict(score) {
  if (score === null || score === undefined) return null;
  if (score >= 1) return el("span", { class: "verdict right" }, "✓ right");
  if (score <= 0) return el("span", { class: "verdict wrong" }, "✕ wrong");
  return el("span", { class: "verdict partly" }, `score ${formatNumber(score)}`);
}

function commandsPart(part) {
  return section(part, el("dl", { class: "commands" }, part.items.map((item, i) => {
    const button = el("button", { type: "button", class: "small", "data-key": `copy-${i}`, "aria-label": `copy: ${item.what}`, onclick: () => copy(item.words, button) }, "copy");
    return el("div", {}, el("dt", {}, item.what), el("dd", {}, el("code", { tabindex: 0 }, item.words), button));
  })));
}

async function copy(text, button) {
  let done = "copied";
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    // Without access to the clipboard, as in a file of some browsers: select it, so that one key copies it.
    getSelection().selectAllChildren(button.previousSibling);
    done = document.execCommand("copy") ? "copied" : "selected";
  }
  button.textContent = done;
  setTimeout(() => (button.textContent = "copy"), 1500);
}
