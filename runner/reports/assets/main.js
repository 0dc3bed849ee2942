// The page: its head, its parts, the theme, and new data while a run goes on.

const PARTS = {
  facts: factsPart, charts: chartsPart, table: tablePart, parallel: parallelPart,
  bars: barsPart, samples: samplesPart, commands: commandsPart, text: textPart,
};
const THEMES = ["auto", "light", "dark"];
const KEY = "runner-report-theme";
const DARK = matchMedia("(prefers-color-scheme: dark)");

const page = {
  /** What the reader chose: sorting, axes, hidden curves; kept when the page is drawn again. */
  state: { open: new Set() },
  drawings: [],
  isLive: false,

  /** Call `draw` once the page is laid out, and whenever colours change. */
  onDraw(draw) {
    this.drawings.push(draw);
  },

  draw() {
    for (const draw of this.drawings) draw();
  },

  show(data) {
    const focused = document.activeElement?.dataset?.key;
    const scrolled = new Map([...document.querySelectorAll("[data-scroll]")].map((box) => [box.dataset.scroll, [box.scrollLeft, box.scrollTop]]));
    const top = scrollY;
    this.isLive = data.refresh !== null;
    this.drawings = [];
    highlight.listeners = [];
    const parts = data.parts.map((part) => PARTS[part.kind]?.(part)).filter(Boolean);
    const main = el("main", {}, parts);
    document.querySelectorAll("body > header, body > main, body > footer").forEach((element) => element.remove());
    document.body.append(pageHeader(data), main, pageFooter(data));
    this.draw();
    main.querySelectorAll("[data-open]").forEach((details) => details.addEventListener("toggle", () => {
      this.state.open[details.open ? "add" : "delete"](details.dataset.open);
    }));
    document.querySelectorAll("[data-scroll]").forEach((box) => box.scrollTo(...(scrolled.get(box.dataset.scroll) ?? [0, 0])));
    scrollTo(0, top);
    if (focused) document.querySelector(`[data-key="${CSS.escape(focused)}"]`)?.focus({ preventScroll: true });
    highlight.notify();
  },
};

function pageHeader(data) {
  const above = data.up ? [link(data.up.text, data.up.href), " › "] : [];
  return el("header", {},
    el("div", { class: "bar-line" }, el("p", { class: "kind" }, above, data.kind), el("span", { class: "live", role: "status" }), themeButton()),
    el("h1", {}, data.title, data.state ? stateBadge(data.state) : null),
    data.tags.length ? el("ul", { class: "tags" }, data.tags.map((tag) => el("li", {}, tag))) : null,
    data.lines.map((line) => el("p", { class: "line" }, line)));
}

function pageFooter() {
  const made = document.querySelector("meta[name=generator]").content.replace("runner report, ", "");
  return el("footer", {}, el("p", {}, page.isLive ? "made by runner report --watch" : `made by runner at ${made}`,
    " · charts by uPlot (MIT)"));
}

function themeButton() {
  const button = el("button", { type: "button", class: "small theme", "data-key": "theme" });
  const label = () => {
    button.textContent = `theme: ${page.state.theme}`;
  };
  button.addEventListener("click", () => {
    setTheme(THEMES[(THEMES.indexOf(page.state.theme) + 1) % THEMES.length]);
    label();
  });
  label();
  return button;
}

/** Show a theme: auto is that of the system. */
function applyTheme(theme) {
  const isDark = theme === "dark" || (theme === "auto" && DARK.matches);
  document.documentElement.dataset.theme = isDark ? "dark" : "light";
  page.draw();
}

function setTheme(theme) {
  page.state.theme = theme;
  applyTheme(theme);
  try {
    localStorage.setItem(KEY, theme);
  } catch {
    // A page in a file may have no storage: the choice lasts until it is closed.
  }
}

function storedTheme() {
  try {
    return localStorage.getItem(KEY);
  } catch {
    return null;
  }
}

/** Ask for new data for as long as the page is open; a server that is gone is said once, and asked again. */
async function follow(seconds) {
  const status = () => document.querySelector(".live");
  let [tag, isGone] = [null, false];
  for (;;) {
    await new Promise((resolve) => setTimeout(resolve, 1000 * seconds));
    if (document.hidden) continue;
    try {
      const answer = await fetch("data.json", { headers: tag ? { "If-None-Match": tag } : {}, cache: "no-store" });
      if (answer.status === 200) {
        tag = answer.headers.get("ETag");
        page.show(await answer.json());
      } else if (answer.status !== 304) throw new Error(`HTTP ${answer.status}`);
      isGone = false;
      status().textContent = "live";
    } catch {
      if (!isGone) status().textContent = "not connected: runner report --watch has ended";
      isGone = true;
    }
  }
}

page.state.theme = THEMES.includes(storedTheme()) ? storedTheme() : "auto";
applyTheme(page.state.theme);
const data = JSON.parse(document.getElementById("data").textContent);
page.show(data);
DARK.addEventListener("change", () => applyTheme(page.state.theme));
addEventListener("resize", () => {
  clearTimeout(page.timer);
  page.timer = setTimeout(() => page.draw(), 150);
});
addEventListener("beforeprint", () => applyTheme("light"));
addEventListener("afterprint", () => applyTheme(page.state.theme));
if (data.refresh !== null) follow(data.refresh);
