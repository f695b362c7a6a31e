/** The Run tab: curves, samples, evaluations and checkpoints of a training run, and of others beside it. */

import { chart, shown } from "./chart.js";
import { announce, button, dialog, field, h, picture, select, showError, stored, toast } from "./ui.js";

const FAST_MS = 3000;
const SLOW_MS = 20000;
const LIVE_SECONDS = 600;
const MOST_POINTS = 4000;

/** What is offered first: a title, and which figures belong to it. */
const GROUPS = [
  ["Loss", (name) => name === "loss"],
  ["Learning rate", (name) => name.startsWith("learning_rate/")],
  ["Gradient norm", (name) => /(^|\/)grad_norm/.test(name)],
  ["Speed", (name) => /_per_second$/.test(name)],
  ["Memory", (name) => /memory|_gib$/.test(name)],
];
const NOT_CURVES = new Set(["wall_time", "finite", "examples", "epoch"]);

const bytes = (size) => {
  const units = ["B", "KB", "MB", "GB", "TB"];
  let power = 0;
  for (; size >= 1000 && power < units.length - 1; power++) size /= 1000;
  return `${power ? size.toPrecision(3) : size} ${units[power]}`;
};

function ago(seconds) {
  const rest = Math.max(0, Date.now() / 1000 - seconds);
  for (const [name, length] of [["day", 86400], ["hour", 3600], ["minute", 60]]) {
    if (rest >= length) return `${Math.floor(rest / length)} ${name}${rest >= 2 * length ? "s" : ""} ago`;
  }
  return rest < 5 ? "just now" : `${Math.floor(rest)} s ago`;
}

/** The curves of one run, kept while the server sends what is new. */
class Figures {
  constructor(api, run) {
    Object.assign(this, { api, run, metrics: {}, evaluations: {}, step: null, generation: null });
  }

  /** Ask for what is new; returns whether there was something. */
  async refresh() {
    const points = Math.max(0, ...Object.values(this.metrics).map((curve) => curve.steps.length));
    const since = points > MOST_POINTS ? null : this.step;
    const answer = await this.api.get("api/run/metrics", { run: this.run, since, generation: since == null ? null : this.generation });
    const changed = answer.reset || Object.keys(answer.metrics).length + Object.keys(answer.evaluations).length > 0;
    for (const part of ["metrics", "evaluations"]) {
      if (answer.reset) this[part] = {};
      for (const [name, { steps, values }] of Object.entries(answer[part])) {
        const curve = (this[part][name] ??= { steps: [], values: [] });
        curve.steps.push(...steps);
        curve.values.push(...values);
      }
    }
    this.step = answer.step ?? this.step;
    this.generation = answer.generation;
    return changed;
  }
}

/** Fill `element` with the tab. */
export async function mount(element, api) {
  const figures = new Map();
  let chosen = null;
  let compared = new Set();
  let summary = null;
  let timer = 0;

  const picker = h("select", { onchange: () => { chosen = picker.value; compared.delete(chosen); refresh(true).catch(showError); } });
  const runField = field("Run", picker);
  const others = h("div", { class: "stack" });
  const compare = h("details", { class: "compare" }, h("summary", {}, "Compare with"), others);
  const status = h("p", { class: "runstatus", role: "status" });
  const facts = h("dl", { class: "runfacts" });
  const header = h("section", { class: "card runhead", "aria-label": "Chosen run" },
    h("div", { class: "row wrap" }, h("div", { class: "grow" }, runField.element), status,
      button("Read again", "again", () => refresh(true).catch(showError))), facts, compare);

  const settings = { smoothing: 0.6, log: false, ...(stored.get("curves") ?? {}) };
  const charts = new Map();
  const chartArea = h("div", { class: "charts" });
  const more = h("select", { onchange: () => { if (more.value) { settings.more = [...new Set([...(settings.more ?? []), more.value])]; keep(); } } });
  const smoothing = h("input", { type: "range", min: 0, max: 0.99, step: 0.01, value: settings.smoothing, oninput: () => { settings.smoothing = Number(smoothing.value); keep(); } });
  const log = h("input", { type: "checkbox", id: "log-scale", checked: settings.log, onchange: () => { settings.log = log.checked; keep(); } });
  const curves = h("section", { class: "card", "aria-label": "Curves" },
    h("header", { class: "wrap" }, h("h2", {}, "Curves"),
      h("label", { class: "check", for: "log-scale" }, log, "Logarithmic"),
      field("Smoothing", smoothing).element, field("More curves", more).element),
    chartArea);
  const evaluationArea = h("div", { class: "charts" });
  const evaluations = h("section", { class: "card", "aria-label": "Evaluations", hidden: true },
    h("header", {}, h("h2", {}, "Evaluations")), evaluationArea);
  const samples = samplesCard(api);
  const checkpoints = checkpointsCard(api, () => chosen, () => refresh(true).catch(showError));
  const page = h("div", { class: "runpage" }, header, h("div", { class: "rungrid" }, h("div", { class: "stack" }, curves, evaluations), h("div", { class: "stack" }, samples.element, checkpoints.element)));
  const waiting = h("div", { class: "empty" });
  element.replaceChildren(waiting, page);

  function keep() {
    stored.set("curves", settings);
    drawCurves();
  }

  function runsShown() {
    return [chosen, ...compared].map((name) => figures.get(name)).filter(Boolean);
  }

  /** Return the series of these figures; of several runs each is named by its run, of equal curves one remains. */
  function seriesOf(part, names, title, short = (name) => name.slice(name.indexOf("/") + 1)) {
    const owners = runsShown().filter((one) => names.some((name) => one[part][name]?.steps.length));
    const several = owners.length > 1;
    return owners.flatMap((one) => {
      const found = names.filter((name) => one[part][name]?.steps.length);
      const groups = new Map();
      for (const name of found) {
        const key = JSON.stringify(one[part][name]);
        groups.set(key, [...(groups.get(key) ?? []), name]);
      }
      return [...groups.values()].map((same) => {
        const label = groups.size === 1 && several ? one.run : [several ? one.run : "", groups.size === 1 ? title : same.map(short).join(", ")].filter(Boolean).join(": ");
        return { name: label, ...one[part][same[0]] };
      });
    });
  }

  function drawCharts(area, wanted) {
    for (const [key, one] of charts) if (one.area === area && !wanted.some(([title]) => `${title}` === key)) { one.chart.element.remove(); charts.delete(key); }
    for (const [title, series, removable] of wanted) {
      if (!charts.has(title)) {
        const made = chart(title);
        if (removable) {
          made.element.querySelector(".row").append(button(`Remove ${title}`, "close", () => { settings.more = settings.more.filter((name) => name !== title); keep(); }));
        }
        charts.set(title, { area, chart: made });
        area.append(made.element);
      }
      charts.get(title).chart.update(series, { log: settings.log, smoothing: area === chartArea ? settings.smoothing : 0 });
    }
  }

  function drawCurves() {
    const known = [...new Set(runsShown().flatMap((one) => Object.keys(one.metrics)))].sort();
    const wanted = GROUPS.slice(0, 2).map(([title, fits]) => [title, seriesOf("metrics", known.filter(fits), title), false]);
    const groups = new Map(GROUPS.slice(2).map(([title, fits]) => [title, known.filter(fits)]));
    for (const name of known) {
      if (!NOT_CURVES.has(name) && !GROUPS.some(([, fits]) => fits(name))) groups.set(name, [name]);
    }
    for (const title of settings.more ?? []) if (groups.get(title)?.length) wanted.push([title, seriesOf("metrics", groups.get(title), title), true]);
    drawCharts(chartArea, wanted);
    const offered = [...groups].filter(([title, names]) => names.length && !(settings.more ?? []).includes(title)).map(([title]) => title);
    if (more.dataset.offered !== offered.join("\n")) {
      more.dataset.offered = offered.join("\n");
      more.replaceChildren(h("option", { value: "" }, "Add…"), ...offered.map((title) => h("option", { value: title }, title)));
    }
    more.value = "";
    const sets = new Map();
    for (const name of new Set(runsShown().flatMap((one) => Object.keys(one.evaluations)))) {
      const [set, what] = name.includes("/") ? [name.slice(0, name.lastIndexOf("/")), name.slice(name.lastIndexOf("/") + 1)] : ["", name];
      if (/^loss/.test(what)) sets.set(set, [...(sets.get(set) ?? []), name]);
    }
    evaluations.hidden = !sets.size;
    const means = [...sets.values()].flat().filter((name) => /(^|\/)loss$/.test(name)).sort();
    const charted = means.length ? [["Evaluation loss", seriesOf("evaluations", means, "loss", (name) => name.replace(/\/?loss$/, "")), false]] : [];
    for (const [set, names] of [...sets].sort()) {
      const quantiles = names.filter((name) => /quantile/.test(name)).sort();
      if (quantiles.length) charted.push([`${set || "Evaluation"}: loss by noise quantile`, seriesOf("evaluations", quantiles, "loss", (name) => name.replace(/^.*loss_quantile_/, "")), false]);
    }
    drawCharts(evaluationArea, charted);
  }

  function drawHeader() {
    const runs = summary.runs;
    const names = runs.map((run) => run.name);
    if (picker.dataset.names !== names.join("\n")) {
      picker.dataset.names = names.join("\n");
      picker.replaceChildren(...names.map((name) => h("option", { value: name }, name)));
      others.replaceChildren(...names.map((name) => {
        const box = h("input", { type: "checkbox", id: `compare-${names.indexOf(name)}`, checked: compared.has(name), onchange: () => {
          if (box.checked) compared.add(name); else compared.delete(name);
          refresh(true).catch(showError);
        } });
        return h("label", { class: "check", for: box.id, dataset: { run: name } }, box, name);
      }));
    }
    picker.value = chosen;
    for (const label of others.children) label.hidden = label.dataset.run === chosen;
    compare.hidden = names.length < 2;
    const run = summary.chosen;
    const live = run.updated && Date.now() / 1000 - run.updated < LIVE_SECONDS;
    const text = run.updated ? `${live ? "Written" : "Last written"} ${ago(run.updated)}` : "No figures yet";
    if (status.textContent !== text) status.textContent = text;
    status.className = `runstatus badge ${live ? "good" : ""}`;
    const rows = { Step: run.step?.toLocaleString("en"), Epoch: run.epoch, Loss: run.loss == null ? null : shown(run.loss), "Images per second": summary.last.images_per_second && shown(summary.last.images_per_second) };
    for (const [key, value] of Object.entries(summary.configuration)) rows[key.replace(/_per_gpu$/, "").replace(/[._]/g, " ")] = value;
    facts.replaceChildren(...Object.entries(rows).filter(([, value]) => value != null).map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", { class: "number" }, String(value)))));
  }

  async function refresh(all = false) {
    clearTimeout(timer);
    try {
      summary = await api.get("api/run", { run: chosen });
      if (!summary.chosen) {
        page.hidden = true;
        waiting.hidden = false;
        waiting.replaceChildren(h("h2", {}, "No run yet"), h("p", {}, `A run that begins in ${summary.root} appears here.`));
        return;
      }
      const changedRun = chosen !== summary.chosen.name;
      chosen = summary.chosen.name;
      page.hidden = false;
      waiting.hidden = true;
      drawHeader();
      for (const name of [chosen, ...compared]) if (!figures.has(name)) figures.set(name, new Figures(api, name));
      const changed = await Promise.all(runsShown().map((one) => one.refresh()));
      if (all || changedRun || changed.some(Boolean)) drawCurves();
      await Promise.all([samples.refresh(chosen), checkpoints.refresh()]);
    } catch (error) {
      if (error.status === 404 && chosen) { chosen = null; compared = new Set(); }
      if (all) throw error;
    } finally {
      const live = summary?.chosen?.updated && Date.now() / 1000 - summary.chosen.updated < LIVE_SECONDS;
      timer = setTimeout(tick, live || !summary?.chosen ? FAST_MS : SLOW_MS);
    }
  }

  /** Look again, unless nobody sees it. */
  function tick() {
    if (element.hidden || document.hidden) timer = setTimeout(tick, FAST_MS);
    else refresh().catch(() => {});
  }

  await refresh(true);
}

/** The grids of samples: one step, two beside each other, or one prompt over all steps. */
function samplesCard(api) {
  let list = [];
  let run = null;
  let known = "";
  const slider = h("input", { type: "range", min: 0, max: 0, step: 1, oninput: () => draw() });
  const label = h("output", { class: "number steplabel" });
  const beside = h("select", { onchange: () => draw() });
  const what = h("select", { onchange: () => draw() });
  const grids = h("div", { class: "samplegrids" });
  const besideField = field("Beside it", beside);
  const controls = h("div", { class: "samplecontrols" }, field("Show", what).element,
    h("div", { class: "field grow" }, h("label", { for: "sample-step" }, "Step"),
      h("div", { class: "row" }, button("Earlier step", "left", () => move(-1)), slider, button("Later step", "right", () => move(1)), label)),
    besideField.element);
  slider.id = "sample-step";
  const none = h("p", { class: "hint" }, "No samples yet. With [sample] in its TOML, a run draws some.");
  const element = h("section", { class: "card", "aria-label": "Samples" }, h("header", {}, h("h2", {}, "Samples")), none, controls, grids);

  function move(by) {
    slider.value = Number(slider.value) + by;
    draw();
    announce(`Step ${list[slider.value]?.step}`);
  }

  const tileName = (sample, index) => `${sample.prompts[index % sample.prompts.length]}, seed ${sample.seeds[Math.floor(index / sample.prompts.length)]}`;

  function grid(sample) {
    const image = picture(api, sample.url, { alt: `Samples of step ${sample.step}: ${sample.prompts.join("; ")}`, width: sample.width, height: sample.height });
    return h("figure", { class: "samples" },
      h("button", { type: "button", class: "imagebutton", "aria-label": `Enlarge the samples of step ${sample.step}`, onclick: () => enlarge(sample) }, image),
      h("figcaption", { class: "hint" }, `Step ${sample.step.toLocaleString("en")}`));
  }

  function tile(sample, index) {
    const image = picture(api, `${sample.tile}${index}`, { alt: `${tileName(sample, index)}, step ${sample.step}` });
    return h("figure", { class: "tile" }, image, h("figcaption", { class: "hint" }, `Step ${sample.step.toLocaleString("en")}`));
  }

  function enlarge(sample) {
    const prompts = h("ul", { class: "stack" }, sample.prompts.map((prompt) => h("li", { class: "row" }, h("span", { class: "grow" }, prompt),
      h("button", { type: "button", onclick: () => { opened.close(); useSettings({ prompt, seed: sample.seeds[0] }); } }, "Draw this"))));
    const opened = dialog(`Step ${sample.step}`, h("div", { class: "stack" }, h("div", { class: "large" }, picture(api, sample.url, { alt: `Samples of step ${sample.step}` })), prompts));
  }

  function draw() {
    none.hidden = list.length > 0;
    controls.hidden = grids.hidden = !list.length;
    if (!list.length) return;
    const sample = list[slider.value] ?? list.at(-1);
    const text = `${sample.step.toLocaleString("en")}`;
    label.textContent = text;
    slider.setAttribute("aria-valuetext", `step ${text}`);
    besideField.element.hidden = list.length < 2;
    if (what.value === "all") {
      grids.className = "samplegrids";
      const other = list.find((each) => each.name === beside.value);
      grids.replaceChildren(...[sample, other].filter(Boolean).map(grid));
    } else {
      grids.className = "samplegrids strip";
      grids.tabIndex = 0;
      const index = Number(what.value);
      grids.replaceChildren(...list.filter((each) => index < each.prompts.length * each.seeds.length).map((each) => tile(each, index)));
    }
    slider.parentElement.parentElement.hidden = what.value !== "all";
    besideField.element.hidden ||= what.value !== "all";
  }

  async function refresh(name) {
    const { samples } = await api.get("api/run/samples", { run: name });
    const now = JSON.stringify([name, samples.map((each) => each.url)]);
    if (now === known) return;
    const atEnd = name !== run || Number(slider.value) >= list.length - 1;
    [known, run, list] = [now, name, samples];
    slider.max = Math.max(0, list.length - 1);
    if (atEnd) slider.value = slider.max;
    const before = [beside.value, what.value];
    beside.replaceChildren(h("option", { value: "" }, "Nothing"), ...list.map((each) => h("option", { value: each.name }, `Step ${each.step.toLocaleString("en")}`)));
    const last = list.at(-1);
    const tiles = last ? [...Array(last.prompts.length * last.seeds.length).keys()] : [];
    what.replaceChildren(h("option", { value: "all" }, "All prompts"), ...tiles.map((index) => h("option", { value: index }, `${tileName(last, index)}, over steps`)));
    [beside.value, what.value] = [list.some((each) => each.name === before[0]) ? before[0] : "", tiles.includes(Number(before[1])) && before[1] !== "" ? before[1] : "all"];
    draw();
  }

  return { element, refresh };
}

/** Open the Draw tab with its settings as they are, and these. */
function useSettings(settings, notes = []) {
  document.dispatchEvent(new CustomEvent("anima:draw", { detail: { settings: { ...(stored.get("settings") ?? {}), ...settings }, notes } }));
}

const KINDS = { model: "Model", adapter: "Adapter", control: "Control network", resume: "To resume from", unknown: "Unknown" };
const PARTS = { exports: "Exports", checkpoints: "Checkpoints", samples: "Samples", other: "Other files" };

/** What a run has saved: a table with sizes and "draw with this one", and the disk. */
function checkpointsCard(api, run, changed) {
  const body = h("tbody");
  const table = h("div", { class: "table fixed", tabindex: 0, role: "region", "aria-label": "Checkpoints" }, h("table", {},
    h("thead", {}, h("tr", {}, ["Name", "Kind"].map((name) => h("th", { scope: "col" }, name)), h("th", { scope: "col", class: "number" }, "Size"), h("th", { scope: "col" }, "Written"), h("th", { scope: "col" }, h("span", { class: "unseen" }, "Action")))), body));
  const disk = h("div", { class: "disk" });
  const none = h("p", { class: "hint" }, "Nothing saved yet.");
  const element = h("section", { class: "card", "aria-label": "Checkpoints" }, h("header", {}, h("h2", {}, "Checkpoints")), none, table, disk);
  let known = "";

  async function load(one, control) {
    control.disabled = true;
    control.textContent = "Loading…";
    try {
      const answer = await api.post(`api/run/checkpoints/${encodeURIComponent(one.name)}/load?run=${encodeURIComponent(run())}`);
      document.dispatchEvent(new CustomEvent("anima:models"));
      if (answer.lora) {
        const rest = (stored.get("settings")?.loras ?? []).filter((lora) => lora.name !== answer.lora);
        useSettings({ loras: [...rest, { name: answer.lora, weight: 1 }] }, [`${one.name} ${answer.note}.`]);
      }
      toast(answer.lora ? `${one.name} is chosen as a LoRA` : answer.kind === "control" ? `${one.name} ${answer.note}` : `Drawing with ${one.name} now`);
    } catch (error) {
      showError(error);
    } finally {
      known = "";
      await refresh().catch(showError);
      changed();
    }
  }

  function row(one) {
    const control = one.kind === "resume" || one.kind === "unknown" ? null
      : one.loaded ? h("span", { class: "badge good" }, "Drawing with it")
        : h("button", { type: "button", "aria-label": `Draw with ${one.name}`, onclick: () => load(one, control) }, "Draw with this one");
    const name = one.epoch != null ? `Epoch ${one.epoch}` : `Step ${one.step?.toLocaleString("en")}`;
    return h("tr", {}, h("th", { scope: "row" }, name, one.ema ? h("span", { class: "badge", title: "Averaged weights" }, "EMA") : null),
      h("td", {}, KINDS[one.kind]), h("td", { class: "number" }, bytes(one.bytes)), h("td", {}, h("time", { datetime: new Date(one.created * 1000).toISOString() }, ago(one.created))), h("td", {}, control));
  }

  function drawDisk(sizes) {
    const parts = Object.keys(PARTS).filter((name) => sizes[name]);
    const total = parts.reduce((sum, name) => sum + sizes[name], 0);
    const bar = h("div", { class: "diskbar", "aria-hidden": "true" });
    parts.forEach((name) => {
      const part = h("span", { class: `part c${Object.keys(PARTS).indexOf(name)}` });
      part.style.flexGrow = sizes[name];
      bar.append(part);
    });
    disk.replaceChildren(h("h3", {}, "Disk"), bar, h("ul", { class: "diskparts" },
      parts.map((name) => h("li", {}, h("span", { class: `key c${Object.keys(PARTS).indexOf(name)}`, "aria-hidden": "true" }), `${PARTS[name]} ${bytes(sizes[name])}`)),
      h("li", {}, `Together ${bytes(total)}`), sizes.free == null ? null : h("li", {}, `Free ${bytes(sizes.free)}`)));
  }

  async function refresh() {
    const { checkpoints, disk: sizes } = await api.get("api/run/checkpoints", { run: run() });
    const now = JSON.stringify([run(), checkpoints]);
    drawDisk(sizes);
    if (now === known) return;
    known = now;
    none.hidden = checkpoints.length > 0;
    table.hidden = !checkpoints.length;
    body.replaceChildren(...checkpoints.map(row));
  }

  return { element, refresh };
}
