/** The Draw tab: form, stage, queue and gallery, and what connects them. */

import { createForm } from "./form.js";
import { gallery } from "./gallery.js";
import { Jobs } from "./jobs.js";
import { mayBePicture, transferred } from "./pictures.js";
import { queue, stage } from "./stage.js";
import { controlPictures, startImage } from "./start.js";
import { announce, button, h, showError, stored, toast } from "./ui.js";

const PREVIEWS = 10;  // of each picture

/** Fill `element` with the tab, once the server has loaded its model. */
export async function mount(element, api) {
  const models = await loadedModels(element, api);
  const defaults = models.defaults ?? {};
  const usual = [defaults.width, defaults.height];
  if (usual[0] && !models.sizes.some(([w, tall]) => w === usual[0] && tall === usual[1])) models.sizes.unshift(usual);
  let lastSeed = stored.get("seed");

  const jobs = new Jobs(api);
  const start = startImage(api, { usual, limits: models.limits, onchange: () => form.refresh(), onSize: (w, tall) => { form.setSize(w, tall); keep(); } });
  const control = controlPictures(api, models.controls ?? [], models.control_kinds ?? [], { onchange: () => form.refresh() });
  let timer = null;
  const keep = () => { clearTimeout(timer); timer = setTimeout(() => stored.set("settings", form.read()), 200); };
  const form = createForm(models, {
    start, control, onchange: keep,
    onReuse: () => {
      if (lastSeed == null) return toast("No picture was drawn yet.");
      form.write({ seed: lastSeed });
      keep();
    },
  });
  const shown = gallery(api, defaults, {
    onReuse: useSettings,
    onFile: (file) => take(file, file.name),
    onStart: useAsStart,
    onControl: models.controls?.length ? (blob) => control.use(blob).then(() => toast("Control picture set")) : null,
  });
  const now = stage(api, jobs, { open: (id) => shown.open(id), again: (job) => send(job.body) });
  const waiting = queue(jobs, { onShow: (job) => now.show(job) });

  const go = h("button", { type: "button", class: "primary draw", title: "Ctrl+Enter", onclick: () => draw() }, "Draw", h("kbd", { "aria-hidden": "true" }, "Ctrl ↵"));
  const bar = h("div", { class: "drawbar" }, form.problem, h("div", { class: "row" }, form.batch.element, go));
  const notice = h("section", { class: "card notice", "aria-label": "Loaded settings", hidden: true });
  const settings = h("form", { class: "settings", novalidate: true, "aria-label": "Settings", onsubmit: (event) => event.preventDefault() }, notice, form.element, bar);
  const results = h("div", { class: "results" }, now.element, waiting.element, shown.element);
  element.replaceChildren(h("div", { class: "studio" }, settings, results));

  const first = Object.fromEntries(["prompt", "loras"].filter((name) => defaults[name]?.length).map((name) => [name, defaults[name]]));
  const isNew = JSON.stringify(first) !== JSON.stringify(stored.get("first", {})); // what --page_prompt and --page_lora say
  stored.set("first", first);
  form.write({ ...defaults, ...stored.get("settings", {}), ...(isNew ? first : {}) });

  async function draw() {
    form.clearErrors();
    if (!form.check()) return;
    try {
      const body = { ...form.read(), ...(await start.request()), ...(await control.request()) };
      body.preview_every = Math.max(1, Math.round((body.steps || PREVIEWS) / PREVIEWS));
      for (const name of ["width", "height", "steps", "batch_size", "guidance_scale", "shift"]) if (body[name] == null) delete body[name];
      await send(body);
    } catch (error) {
      failed(error);
    }
  }

  async function send(body) {
    try {
      const job = await jobs.submit(body);
      if (!jobs.mine.includes(now.shown)) now.show(job);
      else announce(`Queued, ${jobs.mine.length} in the queue`);
      waiting.update();
      if (matchMedia("(max-width: 900px)").matches) now.element.scrollIntoView({ block: "start", behavior: matchMedia("(prefers-reduced-motion: reduce)").matches ? "auto" : "smooth" });
    } catch (error) {
      failed(error);
    }
  }

  function failed(error) {
    if (error.status === 422 || error.status === 400 || error.status === undefined) {
      if (/^denoise/.test(error.message)) start.setError(error.message);
      form.showError(error.message);
      announce(error.message, true);
    } else showError(error);
  }

  /** Show settings of a picture in the form; `notes` are what could not be read. */
  function useSettings(values, notes = [], name = "") {
    form.write({ ...defaults, ...values, loras: values.loras ?? [] });
    start.write(values);
    form.clearErrors();
    keep();
    const here = [start.note() && "start image", control.note() && "control picture"].filter(Boolean);
    notes = [...notes, ...here.map((part) => `the ${part} on this page is still used: remove it if it does not belong to these settings`)];
    notice.hidden = false;
    notice.replaceChildren(
      h("header", {}, h("h2", {}, name ? `Settings of ${name}` : "Settings loaded"), button("Close", "close", () => { notice.hidden = true; })),
      notes.length ? h("ul", {}, notes.map((note) => h("li", {}, note))) : h("p", {}, "All of its settings could be read."));
    announce(`Settings loaded. ${notes.join(" ")}`);
  }

  async function useAsStart(blob) {
    await start.set(blob);
    start.element.closest("details").open = true;
    start.element.scrollIntoView({ block: "nearest" });
    toast("Start image set");
  }

  async function take(blob, name) {
    const action = { label: "Use as start image", run: () => useAsStart(blob).catch(showError) };
    try {
      const { settings: found, notes } = await shown.settingsOf(blob);
      useSettings(found, notes ?? [], name);
      toast("Settings loaded", { action });
    } catch (error) {
      if (error.status >= 400 && error.status < 500 && error.status !== 401) toast(error.message, { kind: "error", action });
      else showError(error);
    }
  }

  function dropping() {
    const overlay = h("p", { class: "dropzone", hidden: true, "aria-hidden": "true" }, "Drop the picture to load its settings");
    element.append(overlay);
    const isHere = () => !element.hidden && !document.querySelector("dialog[open]");
    const hide = () => { overlay.hidden = true; };
    document.addEventListener("dragover", (event) => {
      if (!isHere() || !mayBePicture(event.dataTransfer)) return;
      event.preventDefault();
      overlay.hidden = false;
    });
    document.addEventListener("dragleave", (event) => { if (!event.relatedTarget) hide(); });
    document.addEventListener("dragend", hide);
    document.addEventListener("drop", async (event) => {
      hide();
      if (!isHere() || !mayBePicture(event.dataTransfer)) return;
      event.preventDefault();
      try {
        const blob = await transferred(event.dataTransfer, api);
        if (blob) await take(blob, blob.name ?? "");
        else toast("That is not a picture.", { kind: "error" });
      } catch (error) {
        showError(error);
      }
    });
    document.addEventListener("paste", async (event) => {
      if (!isHere() || event.defaultPrevented || !event.clipboardData.files.length || event.clipboardData.getData("text/plain")) return;
      const blob = await transferred(event.clipboardData, api);
      if (blob) useAsStart(blob).catch(showError);
    });
  }

  jobs.addEventListener("finished", ({ detail: job }) => {
    if (job.mine && job.state === "done" && job.images[0]) {
      lastSeed = String(job.images[0].seed);
      stored.set("seed", lastSeed);
    }
    shown.refresh().catch(() => {});
  });
  let soon = null;
  jobs.addEventListener("picture", () => { // several of a batch are finished in one moment
    clearTimeout(soon);
    soon = setTimeout(() => shown.refresh().catch(() => {}), 300);
  });
  jobs.addEventListener("lost", ({ detail: lost }) => {
    const ours = lost.filter((job) => job.body);
    const action = ours.length ? { label: "Draw again", run: () => ours.forEach((job) => send(job.body)) } : null;
    toast(`The server was started again and has lost ${lost.length === 1 ? "a job" : `${lost.length} jobs`}.`, { kind: "error", action });
  });
  api.addEventListener("online", () => shown.refresh().catch(() => {}));
  document.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.repeat || !(event.ctrlKey || event.metaKey) || element.hidden || document.querySelector("dialog[open]")) return;
    event.preventDefault();
    draw();
  });
  document.addEventListener("anima:settings", ({ detail }) => useSettings(detail?.settings ?? {}, detail?.notes ?? []));
  document.addEventListener("anima:models", async () => {
    try {
      form.loras.update((await api.get("api/models")).loras ?? []);
    } catch (error) {
      showError(error);
    }
  });
  dropping();
  addEventListener("pagehide", () => stored.set("settings", form.read()));

  const again = () => Promise.all([shown.refresh(), jobs.refresh().then(() => { if (jobs.mine.length && !jobs.mine.includes(now.shown)) now.show(jobs.mine[0]); waiting.update(); })]);
  again().catch(showError);
  document.addEventListener("visibilitychange", () => { if (!document.hidden && api.online) again().catch(() => {}); });
}

/** Return what the server has, waiting with a message until its model is loaded. */
async function loadedModels(element, api) {
  for (;;) {
    try {
      return await api.get("api/models");
    } catch (error) {
      if (error.status !== 0 && error.status !== 503) throw error;
      const text = error.status ? `${error.message[0].toUpperCase()}${error.message.slice(1)}…` : "Waiting for the server…";
      element.replaceChildren(h("div", { class: "empty", role: "status" }, h("h2", {}, text), h("p", {}, "This page continues by itself.")));
      await new Promise((resolve) => setTimeout(resolve, 1000));
    }
  }
}
