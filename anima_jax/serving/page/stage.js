/** What is drawn now: previews with a bar for each picture, and the queue. */

import { isActive, remaining, share } from "./jobs.js";
import { announce, button, h, picture, showError } from "./ui.js";

const STATES = { waiting: "Waiting", drawing: "Drawing", done: "Done", failed: "Failed", cancelled: "Cancelled", lost: "Lost" };

function sentence(job) {
  const many = job.tiles.length > 1 ? `${job.tiles.length} pictures` : "1 picture";
  if (job.state === "waiting") return job.position > 0 ? `Waiting, ${job.position} before it` : "Waiting to start";
  if (job.state === "drawing") {
    const left = remaining(job);
    return `Drawing ${many}, ${Math.floor(share(job) * 100)} %${left ? `, ${left}` : ""}`;
  }
  if (job.state === "failed" || job.state === "lost") return `${STATES[job.state]}: ${job.error}`;
  return job.state === "done" ? `Done, ${many}, seed ${job.images[0]?.seed}` : STATES[job.state];
}

/** Return the stage: {element, show(job)}. `open(id)` opens a finished picture. */
export function stage(api, jobs, { open, again }) {
  const heading = h("h2", { id: "stage-title" }, "Picture");
  const line = h("p", { class: "muted number grow", id: "stage-line" });
  const cancel = h("button", { type: "button", class: "danger", onclick: () => jobs.cancel(shown.id).catch(showError) }, "Cancel");
  const retry = h("button", { type: "button", onclick: () => again(shown) }, "Draw again");
  const tiles = h("ul", { class: "tiles" });
  const nothing = h("div", { class: "blank" }, h("p", {}, "What you draw appears here."),
    h("p", { class: "hint" }, "Drop a picture anywhere on this page to load the settings it was made with."));
  const element = h("section", { class: "card stage", "aria-labelledby": "stage-title" },
    h("header", {}, heading, line, retry, cancel), nothing, tiles);
  let shown = null;
  let parts = [];
  let said = "";

  function build(job) {
    shown = job;
    const isSmall = Math.max(job.width ?? 0, job.height ?? 0) <= 128;
    parts = job.tiles.map((tile, index) => {
      const image = h("img", { class: isSmall ? "small" : "", alt: `Preview of picture ${index + 1}` });
      const bar = h("progress", { max: 1, value: 0, "aria-label": `Progress of picture ${index + 1}` });
      const label = h("span", { class: "steps number" });
      const frame = h("div", { class: "frame" }, image, label);
      const item = h("li", {}, frame, bar);
      item.style.setProperty("--ratio", (job.width || 1) / (job.height || 1));
      image.addEventListener("load", () => { if (!job.width) item.style.setProperty("--ratio", image.naturalWidth / image.naturalHeight); });
      return { item, image, bar, label, frame, finished: false };
    });
    tiles.dataset.count = parts.length;
    tiles.replaceChildren(...parts.map(({ item }) => item));
  }

  function update(job) {
    element.setAttribute("aria-busy", String(isActive(job)));
    line.textContent = sentence(job);
    line.classList.toggle("error", job.state === "failed" || job.state === "lost");
    cancel.hidden = !isActive(job);
    retry.hidden = isActive(job) || job.state === "done" || !job.body;
    nothing.hidden = true;
    parts.forEach((part, index) => {
      const { done, total, preview, result = job.state === "done" ? job.images[index] : null } = job.tiles[index];
      part.bar.value = result ? 1 : total ? done / total : 0;
      part.bar.hidden = !isActive(job);
      part.label.hidden = !isActive(job) || Boolean(result);
      part.label.textContent = total ? `${done} / ${total}` : job.state === "waiting" ? "Waiting" : "Preparing";
      if (preview && part.preview !== preview && !part.finished) part.image.src = part.preview = preview;
      part.image.hidden = !part.image.getAttribute("src");
      if (result && !part.finished) {
        part.finished = true;
        part.item.style.setProperty("--ratio", result.width / result.height);
        const final = picture(api, result.url, { class: part.image.className, alt: job.prompt || `Picture ${index + 1}`, loading: "eager" });
        part.frame.replaceChildren(h("button", { type: "button", class: "open", "aria-label": `Open picture ${index + 1}: ${job.prompt ?? ""}`, onclick: () => open(result.id) }, final));
      }
    });
    const quarter = Math.floor(share(job) * 4) * 25;
    const now = job.state === "drawing" ? `Drawing, ${quarter} percent` : sentence(job);
    if (now !== said) announce(said = now);
  }

  jobs.addEventListener("change", ({ detail }) => { if (detail === shown) update(detail); });
  jobs.addEventListener("finished", () => {
    if (jobs.mine.length && shown && !isActive(shown)) setTimeout(() => { if (jobs.mine.length && !isActive(shown)) show(jobs.mine[0]); }, 1500);
  });
  cancel.hidden = retry.hidden = true;

  function show(job) {
    if (job !== shown) build(job);
    update(job);
  }
  return { element, show, get shown() { return shown; } };
}

/** Return the queue: {element, update()}, hidden while at most one job of this browser's is active. */
export function queue(jobs, { onShow }) {
  const list = h("ol", { class: "queue" });
  const count = h("h2", { id: "queue-title", class: "grow" });
  const all = h("button", { type: "button", class: "danger", onclick: () => jobs.cancelAll().catch(showError) });
  const element = h("section", { class: "card", "aria-labelledby": "queue-title", hidden: true }, h("header", {}, count, all), list);
  const rows = new Map();

  function row(job) {
    const state = h("span", { class: "badge" });
    const bar = h("progress", { max: 1, value: 0, "aria-label": "Progress" });
    const prompt = job.prompt || "No prompt";
    const item = h("li", { class: "row" }, state,
      h("button", { type: "button", class: "quiet grow name", onclick: () => onShow(job), title: "Show it above" }, prompt), bar,
      button(`Cancel ${prompt}`, "close", () => jobs.cancel(job.id).catch(showError)));
    return { item, state, bar };
  }

  function update() {
    const active = jobs.active;
    const others = active.length - jobs.mine.length;
    element.hidden = active.length < 2 && !others;
    all.hidden = !jobs.mine.length;
    all.textContent = others ? "Cancel all of mine" : "Cancel all";
    count.textContent = `Queue (${active.length})`;
    for (const [id, { item }] of rows) if (!active.some((job) => job.id === id)) { item.remove(); rows.delete(id); }
    active.forEach((job, index) => {
      if (!rows.has(job.id)) rows.set(job.id, row(job));
      const { item, state, bar } = rows.get(job.id);
      state.textContent = job.state === "waiting" ? `Waiting · ${index + 1}` : `${Math.floor(share(job) * 100)} %`;
      bar.value = share(job);
      if (list.children[index] !== item) list.insertBefore(item, list.children[index] ?? null);
    });
  }
  jobs.addEventListener("change", update);
  jobs.addEventListener("finished", update);
  return { element, update };
}
