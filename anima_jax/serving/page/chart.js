/**
 * Curves: an SVG of our own with a linear or logarithmic scale, smoothing, values under the pointer and by arrow keys,
 * zoom, and the same numbers as a table.
 */

import { button, h, newId } from "./ui.js";

const NS = "http://www.w3.org/2000/svg";
const HEIGHT = 240;
const MARGIN = { top: 10, right: 12, bottom: 24, left: 56 };
const DASHES = ["", "6 3", "2 3", "9 3 2 3", "4 2", "1 2"];
const COLOURS = 6;
const TABLE_ROWS = 200;

function svg(tag, attributes, ...children) {
  const element = document.createElementNS(NS, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

/** Return a number as a person writes it: 4 digits, powers of ten only where they are shorter. */
export function shown(value) {
  if (value == null || !Number.isFinite(value)) return "not finite";
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size < 1e-3 || size >= 1e7) return value.toExponential(2).replace(/\.?0*e\+?/, "e");
  if (Number.isInteger(value)) return value.toLocaleString("en");
  return String(Number(value.toPrecision(4)));
}

/** Return the exponential moving average of values, as TensorBoard smooths: gaps stay, and the beginning is unbiased. */
export function smoothed(values, weight) {
  if (!weight) return values;
  let last = 0;
  let count = 0;
  return values.map((value) => {
    if (value == null) return null;
    last = last * weight + (1 - weight) * value;
    count += 1;
    return last / (1 - weight ** count);
  });
}

/** Return about `count` round numbers from `low` to `high`; of a logarithmic scale powers of ten, or what is between. */
export function ticks(low, high, count, log = false) {
  if (log) {
    const found = [];
    for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power++) {
      for (const digit of [1, 2, 5]) {
        const tick = Number(`${digit}e${power}`);
        if (tick >= low * 0.999 && tick <= high * 1.001) found.push(tick);
      }
    }
    const tens = found.filter((tick) => /^1e/.test(tick.toExponential()));
    const kept = found.length <= count + 2 ? found : tens;
    if (kept.length >= 2) return kept.filter((_, index) => index % Math.ceil(kept.length / (count + 2)) === 0);
  }
  const rough = (high - low) / Math.max(1, count);
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((digit) => digit * power).find((each) => each >= rough * 0.999);
  const found = [];
  for (let at = Math.ceil(low / step - 1e-9) * step; at <= high + step * 1e-9; at += step) found.push(Number(at.toPrecision(12)));
  return found;
}

/** Return the index of the step that is nearest. */
function nearest(steps, step) {
  let low = 0;
  let high = steps.length - 1;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (steps[middle] < step) low = middle + 1;
    else high = middle;
  }
  return low > 0 && step - steps[low - 1] <= steps[low] - step ? low - 1 : low;
}

/**
 * Return {element, update(series, options)}. A series is {name, steps, values}, with null for a value that is not finite;
 * options are {log, smoothing}.
 */
export function chart(title) {
  const id = newId("chart");
  const plot = svg("svg", { class: "plot", role: "img", "aria-hidden": "true" });
  const area = h("div", {
    class: "plotarea", tabindex: 0, role: "group", "aria-roledescription": "chart", "aria-labelledby": `${id}-title`,
    "aria-describedby": `${id}-keys`,
  }, plot);
  const readout = h("output", { class: "readout number", "aria-live": "polite" });
  const legend = h("ul", { class: "legend" });
  const keys = h("p", { class: "unseen", id: `${id}-keys` }, "Arrow keys move along the curve, plus and minus zoom, Escape shows all.");
  const zoomOut = button("Show all steps", "again", () => zoom(null), { hidden: true });
  const body = h("tbody");
  const head = h("tr");
  const table = h("details", { class: "values" }, h("summary", {}, "Table"),
    h("div", { class: "table", tabindex: 0, role: "region", "aria-label": `${title}, values` },
      h("table", {}, h("thead", {}, head), body)));
  const element = h("figure", { class: "chart", "data-chart": title },
    h("div", { class: "row" }, h("h3", { id: `${id}-title`, class: "grow" }, title), zoomOut), area, readout, legend, keys, table);

  let series = [];
  let options = { log: false, smoothing: 0 };
  let range = null;
  let cursor = null;
  let view = null;
  const hidden = new Set();

  const isShown = (one) => !hidden.has(one.name);

  function zoom(to) {
    range = to;
    zoomOut.hidden = !to;
    draw();
  }

  function bounds() {
    const visible = series.filter(isShown);
    const starts = visible.map((one) => one.steps[0]);
    const ends = visible.map((one) => one.steps.at(-1));
    const [from, to] = range ?? [Math.min(...starts), Math.max(...ends)];
    let low = Infinity;
    let high = -Infinity;
    for (const one of visible) {
      for (let at = 0; at < one.steps.length; at++) {
        const value = one.values[at];
        if (value == null || one.steps[at] < from || one.steps[at] > to || (options.log && value <= 0)) continue;
        if (value < low) low = value;
        if (value > high) high = value;
      }
    }
    if (low > high) return null;
    if (options.log) {
      if (low === high) { low /= 2; high *= 2; }
      return { from, to, low: low / 1.05, high: high * 1.05 };
    }
    const room = (high - low || Math.abs(high) || 1) * 0.05;
    return { from, to, low: low >= 0 && low - room < 0 ? 0 : low - room, high: high + room };
  }

  function draw() {
    const width = Math.max(240, area.clientWidth || 600);
    plot.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
    plot.setAttribute("height", HEIGHT);
    plot.replaceChildren();
    drawLegend();
    const limits = series.some(isShown) ? bounds() : null;
    view = null;
    if (!limits) {
      plot.append(svg("text", { x: width / 2, y: HEIGHT / 2, class: "axis", "text-anchor": "middle" },
        series.length ? (options.log ? "No values above 0" : "No values") : "Nothing yet"));
      return;
    }
    const { from, to, low, high } = limits;
    const inner = { width: width - MARGIN.left - MARGIN.right, height: HEIGHT - MARGIN.top - MARGIN.bottom };
    const scale = options.log ? Math.log : (value) => value;
    const x = (step) => MARGIN.left + (to === from ? 0.5 : (step - from) / (to - from)) * inner.width;
    const y = (value) => MARGIN.top + (1 - (scale(value) - scale(low)) / (scale(high) - scale(low))) * inner.height;
    view = { x, y, from, to, width, inner };
    for (const tick of ticks(low, high, 5, options.log)) {
      plot.append(svg("line", { class: "gridline", x1: MARGIN.left, x2: width - MARGIN.right, y1: y(tick), y2: y(tick) }),
        svg("text", { class: "axis", x: MARGIN.left - 8, y: y(tick) + 4, "text-anchor": "end" }, shown(tick)));
    }
    for (const tick of ticks(from, to, Math.max(3, Math.floor(inner.width / 80)))) {
      plot.append(svg("text", { class: "axis", x: x(tick), y: HEIGHT - 6, "text-anchor": "middle" }, tick.toLocaleString("en")));
    }
    const clip = `${id}-clip`;
    plot.append(svg("clipPath", { id: clip }, svg("rect", { x: MARGIN.left, y: 0, width: inner.width, height: HEIGHT - MARGIN.bottom })));
    const curves = svg("g", { "clip-path": `url(#${clip})` });
    series.forEach((one, index) => {
      if (!isShown(one)) return;
      const colour = `c${index % COLOURS}`;
      const dash = DASHES[Math.floor(index / COLOURS) % DASHES.length];
      if (options.smoothing) curves.append(line(one, one.values, `curve faint ${colour}`, ""));
      curves.append(line(one, one.smooth, `curve ${colour}`, dash));
    });
    plot.append(curves, svg("g", { class: "cursor" }));
    drawCursor();
  }

  function line(one, values, kind, dash) {
    let path = "";
    let pen = "M";
    for (let at = 0; at < values.length; at++) {
      const value = values[at];
      if (value == null || (options.log && value <= 0)) { pen = "M"; continue; }
      const point = `${view.x(one.steps[at]).toFixed(1)} ${view.y(value).toFixed(1)}`;
      path += `${pen}${point}`;
      if (pen === "M" && (at + 1 === values.length || values[at + 1] == null)) path += "h.01";
      pen = "L";
    }
    return svg("path", { class: kind, d: path || "M0 0", ...(dash ? { "stroke-dasharray": dash } : {}) });
  }

  function drawCursor() {
    const group = plot.querySelector(".cursor");
    if (!group) return;
    group.replaceChildren();
    if (cursor == null || !view) { readout.textContent = ""; return; }
    const there = (one) => isShown(one) && cursor >= one.steps[0] - 1 && cursor <= one.steps.at(-1) + 1;
    const found = series.filter(there).map((one) => {
      const at = nearest(one.steps, cursor);
      return { one, index: series.indexOf(one), step: one.steps[at], raw: one.values[at], value: one.smooth[at] };
    });
    if (!found.length) return;
    const step = found.reduce((best, each) => (Math.abs(each.step - cursor) < Math.abs(best - cursor) ? each.step : best), found[0].step);
    group.append(svg("line", { class: "crosshair", x1: view.x(step), x2: view.x(step), y1: MARGIN.top, y2: HEIGHT - MARGIN.bottom }));
    for (const each of found) {
      if (each.value == null || (options.log && each.value <= 0)) continue;
      group.append(svg("circle", { class: `dot c${each.index % COLOURS}`, cx: view.x(each.step), cy: view.y(each.value), r: 4 }));
    }
    const value = (each) => (options.smoothing ? `${shown(each.value)} (${shown(each.raw)})` : shown(each.raw));
    readout.textContent = `Step ${step.toLocaleString("en")}: ${found.map((each) =>
      (series.length > 1 ? `${each.one.name} ${value(each)}` : value(each))).join(", ")}`;
  }

  function drawLegend() {
    legend.hidden = series.length < 2;
    legend.replaceChildren(...(series.length < 2 ? [] : series).map((one, index) => h("li", {},
      h("button", {
        type: "button", class: "quiet entry", "aria-pressed": String(isShown(one)),
        onclick: () => { if (hidden.has(one.name)) hidden.delete(one.name); else hidden.add(one.name); draw(); legend.children[index]?.firstChild.focus(); },
      }, svg("svg", { viewBox: "0 0 22 8", width: 22, height: 8, "aria-hidden": "true" },
        svg("path", { class: `curve c${index % COLOURS}`, d: "M0 4H22", "stroke-dasharray": DASHES[Math.floor(index / COLOURS) % DASHES.length] || "none" })),
      h("span", {}, one.name)))));
  }

  function drawTable() {
    if (!table.open) return;
    const steps = [...new Set(series.flatMap((one) => one.steps))].sort((a, b) => a - b);
    const every = Math.ceil(steps.length / TABLE_ROWS);
    const kept = steps.filter((_, index) => index % every === 0 || index === steps.length - 1);
    const known = series.map((one) => new Map(one.steps.map((step, at) => [step, one.values[at]])));
    head.replaceChildren(...["Step", ...series.map((one) => one.name)].map((name) => h("th", { scope: "col", class: "number" }, name)));
    body.replaceChildren(...kept.map((step) => h("tr", {}, h("th", { scope: "row", class: "number" }, step.toLocaleString("en")),
      known.map((values) => h("td", { class: "number" }, values.has(step) ? shown(values.get(step)) : "")))));
  }

  const stepAt = (event) => {
    const box = plot.getBoundingClientRect();
    const at = ((event.clientX - box.left) / box.width) * view.width;
    return view.from + ((at - MARGIN.left) / view.inner.width) * (view.to - view.from);
  };
  let dragged = null;
  area.addEventListener("pointermove", (event) => {
    if (!view) return;
    cursor = Math.min(view.to, Math.max(view.from, stepAt(event)));
    drawCursor();
    if (dragged != null) {
      const [a, b] = [view.x(dragged), view.x(cursor)].sort((one, other) => one - other);
      plot.querySelector(".cursor").append(svg("rect", { class: "selection", x: a, y: MARGIN.top, width: b - a, height: view.inner.height }));
    }
  });
  area.addEventListener("pointerleave", () => { if (document.activeElement !== area) { cursor = null; drawCursor(); } });
  area.addEventListener("pointerdown", (event) => { if (view && event.button === 0 && event.pointerType === "mouse") { dragged = stepAt(event); area.setPointerCapture(event.pointerId); } });
  area.addEventListener("pointerup", (event) => {
    if (dragged == null || !view) return;
    const [from, to] = [dragged, stepAt(event)].sort((a, b) => a - b);
    dragged = null;
    if (view.x(to) - view.x(from) > 8) zoom([Math.max(view.from, from), Math.min(view.to, to)]);
  });
  area.addEventListener("dblclick", () => zoom(null));
  area.addEventListener("keydown", (event) => {
    if (!view) return;
    const steps = series.filter(isShown).map((one) => one.steps).sort((a, b) => b.length - a.length)[0].filter((step) => step >= view.from && step <= view.to);
    const at = cursor == null ? steps.length - 1 : nearest(steps, cursor);
    const move = { ArrowLeft: -1, ArrowRight: 1, PageUp: -Math.ceil(steps.length / 10), PageDown: Math.ceil(steps.length / 10), Home: -Infinity, End: Infinity }[event.key];
    if (move !== undefined) {
      cursor = steps[Math.min(steps.length - 1, Math.max(0, at + (cursor == null && Number.isFinite(move) ? 0 : move)))];
      drawCursor();
    } else if (event.key === "+" || event.key === "=" || event.key === "-") {
      const half = ((view.to - view.from) / 2) * (event.key === "-" ? 2 : 0.5);
      const centre = cursor ?? (view.from + view.to) / 2;
      zoom(half < 1 ? range : [centre - half, centre + half]);
    } else if (event.key === "Escape" && range) zoom(null);
    else return;
    event.preventDefault();
  });
  table.addEventListener("toggle", drawTable);
  let frame = 0;
  new ResizeObserver(() => { cancelAnimationFrame(frame); frame = requestAnimationFrame(draw); }).observe(area);

  return {
    element,
    update(found, changed = {}) {
      options = { ...options, ...changed };
      series = found.filter((one) => one.steps.length);
      for (const one of series) one.smooth = smoothed(one.values, options.smoothing);
      draw();
      drawTable();
    },
  };
}
