// Parallel coordinates: an axis for each setting and the result, a line for each job.

const AXIS = { top: 34, bottom: 22, height: 260, left: 72, right: 78, gap: 118 };
const MOST_TICKS = 8;

function parallelPart(part) {
  const box = el("div", { class: "scroll parallel-box", tabindex: 0, role: "region", "aria-label": `${part.title}: lines`, "data-scroll": part.id });
  page.onDraw(() => box.replaceChildren(drawParallel(part, Math.max(box.clientWidth, AXIS.left + AXIS.right + (part.axes.length - 1) * AXIS.gap))));
  return section(part, rankLegend(), box);
}

function drawParallel(part, width) {
  const scales = part.axes.map((axis, i) => axisScale(part.lines.map((line) => line.values[i]), axis.flip));
  const across = (i) => AXIS.left + (i * (width - AXIS.left - AXIS.right)) / Math.max(1, part.axes.length - 1);
  const height = AXIS.top + AXIS.height + AXIS.bottom;
  const picture = svg("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `${part.title}: the same as the table of jobs, as lines` });
  const lines = [...part.lines].reverse().map((line) => { // the best are drawn last, on top
    const points = line.values.map((value, i) => `${across(i).toFixed(1)},${scales[i].place(value).toFixed(1)}`);
    const path = `M${points.join("L")}`;
    const drawn = svg("path", { d: path, class: "job", stroke: rankColour(line.rank), "data-id": line.id });
    const target = svg("path", {
      d: path, class: "target", "data-id": line.id, onmouseenter: () => highlight.point(line.id),
      onmouseleave: () => highlight.point(null), onclick: () => highlight.toggle(line.id),
    }, svg("title", {}, line.name));
    return { id: line.id, drawn, target };
  });
  picture.append(...lines.map((line) => line.drawn), ...lines.map((line) => line.target));
  part.axes.forEach((axis, i) => picture.append(axisDrawing(axis.name, scales[i], across(i), i === part.axes.length - 1)));
  highlight.onChange(() => {
    for (const { id, drawn } of lines) {
      drawn.classList.toggle("on", highlight.has(id));
      drawn.classList.toggle("off", highlight.isActive && !highlight.has(id));
    }
  });
  return picture;
}

function axisDrawing(name, scale, x, isLast) {
  const bottom = AXIS.top + AXIS.height;
  const ticks = scale.ticks.map(([text, y]) => svg("text", {
    x: isLast ? x + 8 : x - 8, y: y + 4, "text-anchor": isLast ? "start" : "end", class: "tick",
  }, text.length > 14 ? `${text.slice(0, 13)}…` : text));
  const title = svg("text", { x: isLast ? x + AXIS.right - 4 : x, y: 16, "text-anchor": isLast ? "end" : x <= AXIS.left ? "start" : "middle", class: "axis-title" }, name);
  if (x <= AXIS.left && !isLast) title.setAttribute("x", 4);
  return svg("g", {}, svg("line", { x1: x, x2: x, y1: AXIS.top, y2: bottom, class: "axis" }), title, ticks);
}

/** Return where the values of an axis are drawn: few values at equal distances, many numbers on a linear or log scale. */
function axisScale(values, flip) {
  const present = [...new Set(values.filter((value) => value !== null))];
  const numeric = present.every((value) => typeof value === "number");
  const at = (fraction) => AXIS.top + AXIS.height * (flip ? fraction : 1 - fraction);
  if (!numeric || (present.length <= MOST_TICKS && !flip && flip !== false)) {
    const order = numeric ? present.sort((a, b) => a - b) : present.map(String).sort((a, b) => a.localeCompare(b, "en", { numeric: true }));
    const place = (value) => {
      const index = order.indexOf(numeric ? value : String(value));
      return index < 0 ? at(-0.04) : at(order.length === 1 ? 0.5 : index / (order.length - 1));
    };
    return { place, ticks: order.map((value) => [numeric ? formatNumber(value) : value, place(value)]) };
  }
  const [low, high] = [Math.min(...present), Math.max(...present)];
  const isLog = low > 0 && high >= 10 * low;
  const position = isLog ? Math.log : (value) => value;
  const place = (value) => (value === null ? at(-0.04) : at(high === low ? 0.5 : (position(value) - position(low)) / (position(high) - position(low))));
  const middle = [0.25, 0.5, 0.75].map((fraction) => {
    const between = position(low) + fraction * (position(high) - position(low));
    return isLog ? Math.exp(between) : between;
  });
  const round = (value) => Number(value.toPrecision(3));
  return { place, ticks: [low, ...(high > low ? [...middle, high] : [])].map((value) => [formatNumber(round(value)), place(value)]) };
}
