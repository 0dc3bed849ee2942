// Tables: sortable by their titles; a row with an id lights up together with its curve.

const MANY_ROWS = 20; // more than this scroll in a box of their own, so that the curves stay near

function tablePart(part) {
  const state = (page.state[`${part.id}-sort`] ??= part.sorted && { ...part.sorted });
  const body = el("tbody");
  const headings = part.columns.map((column, i) => heading(part, column, i, () => show()));
  const rows = part.rows.map((row, i) => tableRow(part, row, i));
  const show = () => {
    const sort = page.state[`${part.id}-sort`];
    headings.forEach((cell, i) => {
      const direction = sort?.column === i ? (sort.down ? "descending" : "ascending") : null;
      if (direction) cell.setAttribute("aria-sort", direction);
      else cell.removeAttribute("aria-sort");
    });
    const order = part.rows.map((row, i) => i);
    if (sort) order.sort((a, b) => compare(part.rows[a].cells[sort.column], part.rows[b].cells[sort.column], sort.down) || a - b);
    body.replaceChildren(...order.flatMap((i) => rows[i]));
    const linked = order.map((i) => rows[i][0]).filter((row) => row.dataset.id);
    linked.forEach((row, i) => (row.tabIndex = i === 0 ? 0 : -1)); // one stop for the tab key; arrow keys do the rest
  };
  show();
  const table = el("table", {}, el("thead", {}, el("tr", {}, headings)), body);
  const box = el("div", { class: part.rows.length > MANY_ROWS ? "scroll tall" : "scroll", tabindex: part.rows.some((row) => row.id) ? null : 0, role: "region", "aria-label": `${part.title}: table`, "data-scroll": part.id }, table);
  if (part.rows.some((row) => row.id)) connect(table, rows);
  if (!part.closed) return section(part, box);
  const details = el("details", { "data-open": part.id, open: page.state.open.has(part.id) }, el("summary", {}, `${part.rows.length} entries`), box);
  return section(part, details);
}

function heading(part, column, i, show) {
  const attributes = { scope: "col", class: column.number ? "number" : null, title: column.help || null };
  if (!part.sortable) return el("th", attributes, column.title);
  const sort = () => {
    const before = page.state[`${part.id}-sort`];
    page.state[`${part.id}-sort`] = { column: i, down: before?.column === i ? !before.down : false };
    show();
  };
  return el("th", attributes, el("button", { type: "button", onclick: sort, "data-key": `${part.id}-sort-${i}` },
    column.title, el("span", { class: "arrow", "aria-hidden": "true" })));
}

/** Return the row, and the row of its notes where it has some. */
function tableRow(part, row, number) {
  const cells = row.cells.map((cell, i) => el("td", { class: cellClass(part.columns[i]) }, cellContent(cell, part.columns[i])));
  const line = el("tr", { "data-id": row.id, "data-key": row.id ? `${part.id}-row-${row.id}` : null }, cells);
  if (!row.notes.length) return [line];
  return [line, el("tr", { class: "notes" }, el("td", { colspan: part.columns.length }, row.notes.join("\n")))];
}

function cellClass(column) {
  return [column.number && "number", column.code && "code", column.wide && "wide"].filter(Boolean).join(" ") || null;
}

function cellContent(cell, column) {
  if (cell === null || cell === undefined) return el("span", { class: "none" }, "–");
  if (typeof cell === "number") return column.digits === null ? formatNumber(cell) : cell.toFixed(column.digits);
  if (typeof cell === "string") return column.code ? breakable(cell) : cell;
  if (cell.state !== undefined) return stateBadge(cell.state);
  return cell.href ? link(cell.text, cell.href) : cell.text;
}

function sortValue(cell) {
  return cell !== null && typeof cell === "object" ? cell.sort : cell;
}

/** Order two cells: numbers before texts, and cells without a value last, whichever way the table is sorted. */
function compare(first, second, down) {
  const [a, b] = [sortValue(first), sortValue(second)];
  const missing = (value) => value === null || value === undefined || value === "";
  if (missing(a) || missing(b)) return Number(missing(a)) - Number(missing(b));
  const sign = down ? -1 : 1;
  if (typeof a === "number" && typeof b === "number") return sign * (a - b);
  if (typeof a !== typeof b) return typeof a === "number" ? -1 : 1;
  return sign * String(a).localeCompare(String(b), "en", { numeric: true });
}

/** Let the rows of a table highlight what they stand for, and show what is highlighted elsewhere. */
function connect(table, rows) {
  const lines = rows.map((row) => row[0]);
  const rowOf = (event) => event.target.closest("tr[data-id]");
  table.addEventListener("mouseover", (event) => highlight.point(rowOf(event)?.dataset.id ?? null));
  table.addEventListener("mouseleave", () => highlight.point(null));
  table.addEventListener("focusin", (event) => rowOf(event) && highlight.point(rowOf(event).dataset.id));
  table.addEventListener("focusout", () => highlight.point(null));
  table.addEventListener("click", (event) => rowOf(event) && !event.target.closest("a") && highlight.toggle(rowOf(event).dataset.id));
  table.addEventListener("keydown", (event) => {
    const row = rowOf(event);
    if (!row || event.target !== row) return;
    const shown = [...table.querySelectorAll("tbody tr[data-id]")];
    const place = shown.indexOf(row);
    const moves = { ArrowDown: place + 1, ArrowUp: place - 1, Home: 0, End: shown.length - 1 };
    if (event.key in moves) {
      const next = shown[Math.min(shown.length - 1, Math.max(0, moves[event.key]))];
      row.tabIndex = -1;
      next.tabIndex = 0;
      next.focus();
    } else if (event.key === "Enter" || event.key === " ") highlight.toggle(row.dataset.id);
    else if (event.key === "Escape") highlight.clear();
    else return;
    event.preventDefault();
  });
  highlight.onChange(() => {
    for (const row of lines) {
      row.classList.toggle("on", highlight.has(row.dataset.id ?? null));
      if (row.dataset.id) row.setAttribute("aria-selected", String(highlight.pinned.has(row.dataset.id)));
    }
  });
}
