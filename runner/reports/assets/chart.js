// Charts of curves, drawn by uPlot.

const NEAR = 40; // pixels within which a curve counts as pointed at
const DASHES = [[], [6, 3], [2, 3], [9, 3, 2, 3], [12, 4], [4, 4]];
const WHOLE = [1, 2, 5].flatMap((n) => [...Array(12).keys()].map((power) => n * 10 ** power)).sort((a, b) => a - b);
const SYNC = uPlot.sync("page");

function chartsPart(part) {
  const axes = [...new Set(part.charts.flatMap((chart) => chart.curves.flatMap((curve) => Object.keys(curve.x))))];
  const figures = part.charts.map((chart, i) => new Chart(chart, `${part.id}-${i}`, i === 0));
  const chooser = axes.length > 1 ? axisChooser(part.id, axes, figures) : null;
  if (!figures.length) return null;
  return section(part, chooser, el("div", { class: "grid" }, figures.map((figure) => figure.element)));
}

function axisChooser(id, axes, figures) {
  const chosen = axes.includes(page.state[`${id}-x`]) ? page.state[`${id}-x`] : axes[0];
  const choose = (axis) => {
    page.state[`${id}-x`] = axis;
    figures.forEach((figure) => figure.setAxis(axis));
  };
  figures.forEach((figure) => (figure.axis = chosen));
  const radios = axes.map((axis) =>
    el("label", {}, el("input", {
      type: "radio", name: `${id}-x`, value: axis, "data-key": `${id}-x-${axis}`,
      checked: axis === chosen, onchange: () => choose(axis),
    }), el("span", {}, axis)));
  return el("fieldset", { class: "chooser" }, el("legend", {}, "by"), radios);
}

class Chart {
  constructor(chart, id, isWide) {
    if (chart.ranked) chart = { ...chart, curves: [...chart.curves].reverse() }; // the best are drawn last, on top
    Object.assign(this, { chart, id, isWide, axis: Object.keys(chart.curves[0].x)[0], plot: null, near: null });
    this.log = page.state[`${id}-log`] ?? chart.log;
    this.hidden = page.state[`${id}-hidden`] ??= new Set();
    this.readout = el("p", { class: "readout" });
    this.box = el("div", {
      class: "plot", tabindex: 0, role: "group", "aria-roledescription": "chart", "data-key": id,
      "aria-label": this.description(), onkeydown: (event) => this.onKey(event),
      onblur: () => this.setReadout(null), onmouseleave: () => this.leave(), onclick: () => this.pin(),
    });
    this.cutNote = chart.top === null ? null : el("p", { class: "note" },
      `${chart.above === 1 ? "1 curve goes" : `${chart.above} curves go`} above ${formatNumber(chart.top)}, where the chart ends; the log scale shows all.`);
    const thinned = chart.thinned
      ? el("p", { class: "note" }, `${chart.thinned[0].toLocaleString("en")} of ${chart.thinned[1].toLocaleString("en")} ` +
          "points are drawn: the lowest and the highest of each group.")
      : null;
    this.element = el("figure", { class: isWide ? "chart wide" : "chart" },
      el("div", { class: "head" }, el("figcaption", {}, chart.title, el("span", { class: "unit" }, chart.y)), this.logButton()),
      this.legend(), this.box, this.readout, this.cutNote, thinned);
    this.setReadout(null);
    page.onDraw(() => this.draw());
    if (chart.ranked) highlight.onChange(() => this.showHighlight());
  }

  /** What a screen reader says of the chart: each curve's first and last value, or for many the range. */
  description() {
    const { curves, title } = this.chart;
    const axis = Object.keys(curves[0].x)[0];
    if (curves.length > 4) return `${title}, ${curves.length} curves by ${axis}. Arrow keys move along and between them.`;
    return `${title} by ${axis}. ` + curves.map((curve) => {
      const last = curve.y.length - 1;
      return `${curve.name}: ${formatNumber(curve.y[0])} at ${formatNumber(curve.x[axis][0])}, ` +
        `${formatNumber(curve.y[last])} at ${formatNumber(curve.x[axis][last])}`;
    }).join("; ") + ". Arrow keys move along the curve.";
  }

  logButton() {
    const values = this.chart.curves.flatMap((curve) => curve.y).filter((value) => value !== null);
    if (this.chart.lowerIsBetter === null || !values.every((value) => value > 0)) return null;
    return el("button", {
      type: "button", class: "small", "aria-pressed": String(this.log), "data-key": `${this.id}-log`,
      onclick: (event) => {
        this.log = page.state[`${this.id}-log`] = !this.log;
        event.currentTarget.setAttribute("aria-pressed", String(this.log));
        this.draw();
      },
    }, "log scale");
  }

  legend() {
    const { curves, ranked, marks } = this.chart;
    if (ranked) return curves.length > 1 ? rankLegend(marks.some((mark) => mark.kind === "stop") ? stopSample() : null) : null;
    if (curves.length < 2 && !marks.length) return null;
    const buttons = curves.length < 2 ? [] : curves.map((curve, i) => el("button", {
      type: "button", class: "small key", "aria-pressed": String(!this.hidden.has(curve.name)), "data-key": `${this.id}-key-${i}`,
      onclick: (event) => {
        const isHidden = !this.hidden.delete(curve.name);
        if (isHidden) this.hidden.add(curve.name);
        event.currentTarget.setAttribute("aria-pressed", String(!isHidden));
        this.plot?.setSeries(i + 1, { show: !isHidden });
        this.setReadout(null);
      },
    }, lineSample(i), curve.name));
    const sample = (className, text) => el("span", { class: "key" },
      svg("svg", { width: 12, height: 12, viewBox: "0 0 12 12", class: className, "aria-hidden": "true" },
        svg("path", { d: "M6 1 L11 6 L6 11 L1 6 Z" })), text);
    if (marks.length) buttons.push(sample("mark", "checkpoint"));
    if (marks.some((mark) => mark.strong)) buttons.push(sample("mark strong", "the result"));
    return el("div", { class: "legend" }, buttons);
  }

  colour(i) {
    const curve = this.chart.curves[i];
    if (this.chart.ranked) return highlight.pinned.has(curve.id) || highlight.pointed === curve.id
      ? style("--accent") : rankColour(curve.rank);
    return style(`--curve-${i % 6}`);
  }

  /** Points of all curves on one axis: uPlot wants a single sorted list of positions. */
  data() {
    const tables = this.chart.curves.map((curve) => {
      const points = curve.x[this.axis].map((x, i) => [x, curve.y[i]]).sort((a, b) => a[0] - b[0]);
      const unique = points.filter((point, i) => i === points.length - 1 || points[i + 1][0] !== point[0]);
      return [unique.map((point) => point[0]), unique.map((point) => point[1])];
    });
    return uPlot.join(tables);
  }

  options() {
    const { curves, ranked } = this.chart;
    const many = curves.length > 12;
    const axis = (extra) => ({
      stroke: () => style("--muted"), font: `12px ${style("--font")}`, labelFont: `12px ${style("--font")}`,
      grid: { stroke: () => style("--grid"), width: 1 }, ticks: { stroke: () => style("--grid"), width: 1, size: 4 }, ...extra,
    });
    return {
      width: Math.max(200, this.box.clientWidth), height: this.isWide ? 300 : 190,
      scales: { x: { time: false }, y: { distr: this.log ? 3 : 1, range: this.log ? paddedLog : (plot, low, high) => padded(plot, low, Math.min(high, this.chart.top ?? high)) } },
      legend: { show: false },
      padding: [10, 14, 0, 0],
      cursor: {
        sync: { key: SYNC.key, scales: ["x", null] }, drag: { x: true, y: false },
        points: { size: 7, show: ranked ? false : undefined },
        dataIdx: (plot, series, index) => nearestIndex(plot.data[series], index),
      },
      axes: [
        axis({ size: 34, incrs: this.axis === "step" ? WHOLE : undefined, values: (plot, ticks) => ticks.map(shortNumber) }),
        axis({ size: axisSize, values: (plot, ticks) => ticks.map((tick) => (tick === null ? "" : shortNumber(tick))) }),
      ],
      series: [{}, ...curves.map((curve, i) => ({
        label: curve.name, stroke: () => this.colour(i), spanGaps: true, show: !this.hidden.has(curve.name),
        width: ranked ? (many ? 1.25 : 1.75) : 2, dash: ranked ? undefined : DASHES[i % DASHES.length],
        points: { show: curve.y.length <= (many ? 1 : 30), size: 5, stroke: () => this.colour(i), fill: () => style("--surface") },
      }))],
      hooks: {
        draw: [(plot) => this.drawRungs(plot), (plot) => this.drawMarks(plot)],
        setCursor: [(plot) => this.onCursor(plot)],
      },
    };
  }

  draw() {
    if (!this.box.isConnected) return;
    if (this.cutNote) this.cutNote.hidden = this.log;
    this.plot?.destroy();
    this.plot = new uPlot(this.options(), this.data(), this.box);
    SYNC.sub(this.plot);
    this.observer ??= new ResizeObserver(() => {
      const width = Math.max(200, this.box.clientWidth);
      if (this.plot && this.plot.width !== width) this.plot.setSize({ width, height: this.plot.height });
    });
    this.observer.observe(this.box);
    if (this.chart.ranked) this.showHighlight();
  }

  setAxis(axis) {
    this.axis = axis;
    this.draw();
    this.setReadout(null);
  }

  /** Lines at the rungs of a search, where the axis is that of steps. */
  drawRungs(plot) {
    const { ctx: context, bbox } = plot;
    if (this.axis !== "step") return;
    context.save();
    context.strokeStyle = style("--muted");
    context.lineWidth = devicePixelRatio;
    context.setLineDash([3 * devicePixelRatio, 3 * devicePixelRatio]);
    for (const rung of this.chart.rungs) {
      const x = plot.valToPos(rung, "x", true);
      if (!(x >= bbox.left && x <= bbox.left + bbox.width)) continue;
      context.beginPath();
      context.moveTo(x, bbox.top);
      context.lineTo(x, bbox.top + bbox.height);
      context.stroke();
    }
    context.restore();
  }

  drawMarks(plot) {
    const context = plot.ctx;
    const ratio = devicePixelRatio;
    context.save();
    for (const mark of this.chart.marks) {
      const x = plot.valToPos(mark.x[this.axis] ?? NaN, "x", true);
      const y = plot.valToPos(mark.y, "y", true);
      if (!(x >= plot.bbox.left - 1 && x <= plot.bbox.left + plot.bbox.width + 1) || Number.isNaN(y)) continue;
      const size = (mark.kind === "stop" ? (this.chart.marks.length > 60 ? 2 : 3.5) : mark.strong ? 7 : 5) * ratio;
      context.beginPath();
      if (mark.kind === "stop") {
        context.moveTo(x - size, y - size);
        context.lineTo(x + size, y + size);
        context.moveTo(x + size, y - size);
        context.lineTo(x - size, y + size);
        context.strokeStyle = style("--text");
        context.lineWidth = 1.5 * ratio;
        context.stroke();
        continue;
      }
      context.moveTo(x, y - size);
      context.lineTo(x + size, y);
      context.lineTo(x, y + size);
      context.lineTo(x - size, y);
      context.closePath();
      context.fillStyle = mark.strong ? style("--mark") : style("--surface");
      context.strokeStyle = style("--mark");
      context.lineWidth = 2 * ratio;
      context.fill();
      context.stroke();
    }
    context.restore();
  }

  onCursor(plot) {
    const index = plot.cursor.idx;
    if (index === null || index === undefined) return;
    this.index = index;
    if (this.chart.ranked && plot.cursor.event && plot.root.matches(":hover")) {
      this.near = nearestCurve(plot, this.chart.curves);
      highlight.point(this.near === null ? null : this.chart.curves[this.near].id);
    }
    this.setReadout(index);
  }

  leave() {
    if (this.chart.ranked) highlight.point(null);
    this.near = null;
    this.setReadout(null);
  }

  pin() {
    if (this.chart.ranked && this.near !== null) highlight.toggle(this.chart.curves[this.near].id);
  }

  onKey(event) {
    const steps = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity };
    const plot = this.plot;
    if (!plot) return;
    if (event.key in steps) {
      const last = plot.data[0].length - 1;
      this.index = Math.min(last, Math.max(0, (this.index ?? -1) + steps[event.key]));
      this.readout.setAttribute("aria-live", "polite");
      const x = plot.data[0][this.index];
      plot.setCursor({ left: plot.valToPos(x, "x"), top: plot.height / 3 });
      this.setReadout(this.index);
    } else if (this.chart.ranked && (event.key === "ArrowUp" || event.key === "ArrowDown")) {
      const count = this.chart.curves.length;
      const step = event.key === "ArrowDown" ? -1 : 1; // down from the best, which is the last
      this.near = ((this.near ?? (step < 0 ? count : -1)) + step + count) % count;
      this.readout.setAttribute("aria-live", "polite");
      highlight.point(this.chart.curves[this.near].id);
    } else if (this.chart.ranked && event.key === "Enter") {
      this.pin();
    } else if (event.key === "Escape") {
      highlight.clear();
    } else return;
    event.preventDefault();
  }

  showHighlight() {
    if (this.plot) {
      this.chart.curves.forEach((curve, i) => {
        const isOn = highlight.has(curve.id);
        this.plot.series[i + 1].alpha = !highlight.isActive || isOn ? 1 : 0.25;
        this.plot.series[i + 1].width = isOn ? 3 : this.chart.curves.length > 12 ? 1.25 : 1.75;
      });
      this.plot.redraw(false);
    }
    if (this.plot) this.setReadout(this.plot.root.matches(":hover") ? this.index ?? null : null);
  }

  /** Show the values at an index of the data, or without one a summary. */
  setReadout(index) {
    const { curves, ranked, marks } = this.chart;
    const shown = curves.map((curve, i) => [curve, i]).filter(([curve]) => (ranked ? highlight.has(curve.id) : !this.hidden.has(curve.name)));
    if (index === null || !this.plot || !shown.length) {
      this.readout.textContent = ranked && shown.length
        ? shown.map(([curve]) => `${curve.name}: ${this.summary(curve)}`).join(" · ")
        : curves.length === 1 || ranked ? this.summary(bestCurve(curves, this.chart.lowerIsBetter)) : curves.filter((curve) => !this.hidden.has(curve.name)).map((curve) => `${curve.name} ${this.summary(curve)}`).join(" · ");
      return;
    }
    const data = this.plot.data;
    const x = data[0][index];
    const values = shown.map(([curve, i]) => {
      const value = data[i + 1][nearestIndex(data[i + 1], index)];
      return `${curves.length > 1 ? `${curve.name}${ranked ? ":" : ""} ` : ""}${formatNumber(value)}`;
    });
    const here = marks.filter((mark) => mark.kind !== "stop" && mark.x[this.axis] === x).map((mark) => mark.text);
    this.readout.textContent = [`${this.axis} ${formatNumber(x)}`, ...values, ...here].join(" · ");
  }

  summary(curve) {
    const present = curve.y.map((value, i) => [value, i]).filter(([value]) => value !== null);
    if (this.chart.lowerIsBetter === null) {
      return present.length > 1 ? `${formatNumber(present[0][0])} → ${formatNumber(present.at(-1)[0])}` : formatNumber(present[0][0]);
    }
    const sign = this.chart.lowerIsBetter ? 1 : -1;
    const [value, i] = present.reduce((best, point) => (sign * point[0] < sign * best[0] ? point : best));
    const name = this.chart.ranked && !highlight.isActive ? `${curve.name}: ` : "";
    return `${name}${this.chart.lowerIsBetter ? "lowest" : "highest"} ${formatNumber(value)} at ${this.axis} ${formatNumber(curve.x[this.axis][i])}`;
  }
}

function bestCurve(curves, lowerIsBetter) {
  const sign = lowerIsBetter ? 1 : -1;
  const best = (curve) => Math.min(...curve.y.filter((value) => value !== null).map((value) => sign * value));
  return curves.reduce((first, curve) => (best(curve) < best(first) ? curve : first));
}

function padded(plot, low, high) {
  const margin = (high - low || Math.abs(high) || 1) * 0.06;
  return [low >= 0 && low - margin < 0 ? 0 : low - margin, high + margin];
}

/** Return the width of the axis of values: that of its longest number. */
function axisSize(plot, texts) {
  const longest = Math.max(0, ...(texts ?? []).map((text) => text.length));
  return Math.max(44, 7.2 * longest + 16);
}

/** Return round ends of a logarithmic axis: 1, 2 or 5 times a power of ten. */
function paddedLog(plot, low, high) {
  if (low === null) return [1, 10];
  const round = (value, pick) => {
    const power = 10 ** Math.floor(Math.log10(value));
    return power * pick([1, 2, 5, 10], value / power);
  };
  return [
    round(low / 1.02, (steps, ratio) => steps.findLast((step) => step <= ratio * 1.000001)),
    round(high * 1.02, (steps, ratio) => steps.find((step) => step >= ratio * 0.999999)),
  ];
}

function shortNumber(value) {
  const size = Math.abs(value);
  if (size >= 1e6) return `${formatNumber(value / 1e6)}M`;
  return size >= 1e4 ? `${formatNumber(value / 1e3)}k` : formatNumber(value);
}

/** Return the index nearest to `index` at which there is a value. */
function nearestIndex(values, index) {
  for (let distance = 0; distance < values.length; distance++) {
    if (values[index - distance] !== null && values[index - distance] !== undefined) return index - distance;
    if (values[index + distance] !== null && values[index + distance] !== undefined) return index + distance;
  }
  return index;
}

/** Return the curve that passes nearest to the cursor, or null where none is near. */
function nearestCurve(plot, curves) {
  const { left, top, idx } = plot.cursor;
  let [best, found] = [NEAR, null];
  curves.forEach((curve, i) => {
    const y = heightAt(plot, i + 1, left, idx);
    if (y !== null && Math.abs(y - top) < best) [best, found] = [Math.abs(y - top), i];
  });
  return found;
}

/** Return where a curve is, in pixels from the top, at `left`: between its two points beside it. */
function heightAt(plot, series, left, index) {
  const [xs, ys] = [plot.data[0], plot.data[series]];
  const present = (i) => ys[i] !== null && ys[i] !== undefined;
  let [before, after] = [index, index];
  while (before >= 0 && !(present(before) && plot.valToPos(xs[before], "x") <= left)) before--;
  while (after < xs.length && !(present(after) && plot.valToPos(xs[after], "x") >= left)) after++;
  const point = (i) => [plot.valToPos(xs[i], "x"), plot.valToPos(ys[i], "y")];
  if (before < 0 && after >= xs.length) return null;
  if (before < 0 || after >= xs.length) {
    const [x, y] = point(before < 0 ? after : before);
    return Math.abs(x - left) < NEAR ? y : null;
  }
  const [[x0, y0], [x1, y1]] = [point(before), point(after)];
  return x1 === x0 ? y0 : y0 + ((left - x0) / (x1 - x0)) * (y1 - y0);
}

function lineSample(i) {
  return svg("svg", { width: 26, height: 10, viewBox: "0 0 26 10", class: `line line-${i % 6}`, "aria-hidden": "true" },
    svg("line", { x1: 1, y1: 5, x2: 25, y2: 5, "stroke-dasharray": DASHES[i % DASHES.length].join(" ") || null }));
}

function rankLegend(more = null) {
  return el("div", { class: "legend ranks" }, el("span", {}, "best"),
    el("span", { class: "ramp", "aria-hidden": "true" }, [0, 1, 2, 3, 4].map((i) => el("span", { class: `rank-${i}` }))),
    el("span", {}, "worst"), more);
}

function stopSample() {
  return el("span", { class: "key" },
    svg("svg", { width: 10, height: 10, viewBox: "0 0 10 10", class: "stop", "aria-hidden": "true" }, svg("path", { d: "M1 1 L9 9 M9 1 L1 9" })),
    "stopped at a rung");
}
