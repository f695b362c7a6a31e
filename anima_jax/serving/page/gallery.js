/** The gallery: thumbnails, newest first, and a viewer with a picture's settings. */

import { DRAGGED } from "./pictures.js";
import { announce, button, confirm, dialog, h, picture, showError, toast } from "./ui.js";

const PAGE = 40;

const LABELS = { guidance_scale: "Guidance", batch_size: "Pictures", negative_prompt: "Negative prompt", sampler_options: "Sampler options" };
const label = (name) => LABELS[name] ?? name[0].toUpperCase() + name.slice(1).replaceAll("_", " ");

function shown(value) {
  if (value === true) return "On";
  if (Array.isArray(value)) return value.map((one) => (typeof one === "object" ? `${one.name ?? JSON.stringify(one)} ${JSON.stringify(one.weight ?? "")}`.trim() : one)).join(", ");
  if (typeof value === "object") return Object.entries(value).map(([name, one]) => `${name} ${one}`).join(", ");
  return String(value);
}

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    const area = h("textarea", { class: "unseen", value: text });
    (document.querySelector("dialog[open]") ?? document.body).append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
  toast("Prompt copied");
}

/** Return {element, refresh(), open(id)}. `actions` are onReuse(settings, notes), onFile(file), onStart(blob), onControl(blob) or null. */
export function gallery(api, defaults, actions) {
  const grid = h("ul", { class: "gallery" });
  const more = h("button", { type: "button", hidden: true, onclick: () => load().catch(showError) }, "Show more");
  const none = h("p", { class: "hint" }, "No pictures yet.");
  const file = h("input", { type: "file", accept: "image/*", class: "unseen", tabindex: -1, "aria-label": "Picture with settings" });
  file.addEventListener("change", () => { if (file.files[0]) actions.onFile(file.files[0]); file.value = ""; });
  const element = h("section", { class: "card gallery-card", "aria-labelledby": "gallery-title" },
    h("header", {}, h("h2", { id: "gallery-title" }, "Gallery"), file,
      h("button", { type: "button", class: "quiet", onclick: () => file.click() }, "Load settings from a picture")), none, grid, h("p", { class: "more" }, more));
  let images = [];
  let generation = 0;
  let loading = null;

  function tile(image) {
    const thumbnail = picture(api, image.thumbnail ?? image.url, { alt: "", class: Math.max(image.width, image.height) <= 128 ? "small" : "", draggable: "true" });
    const open = h("button", { type: "button", class: "open", "aria-label": `Open: ${image.prompt || "picture without a prompt"}`, title: image.prompt ?? "", onclick: () => view(image.id) }, thumbnail);
    thumbnail.addEventListener("dragstart", (event) => {
      event.dataTransfer.setData(DRAGGED, image.url);
      event.dataTransfer.effectAllowed = "copy";
    });
    return h("li", { dataset: { id: image.id } }, open);
  }

  function show(added, where) {
    const isNew = added.filter((image) => !images.some((one) => one.id === image.id));
    images = where === "start" ? [...isNew, ...images] : [...images, ...isNew];
    if (where === "start") grid.prepend(...isNew.map(tile));
    else grid.append(...isNew.map(tile));
    none.hidden = images.length > 0;
  }

  async function fetchPage(before) {
    const answer = await api.get("api/images", { limit: PAGE, before });
    return answer.images ?? answer;
  }

  /** Load older pictures. */
  function load() {
    const of = generation;
    loading ??= fetchPage(images.at(-1)?.id).then((found) => {
      if (of !== generation) return;
      show(found, "end");
      more.hidden = found.length < PAGE;
    }).finally(() => { loading = null; });
    return loading;
  }

  /** Show what the server has now. */
  async function refresh() {
    const found = await fetchPage();
    const isContinued = images.length && found.some((image) => images.some((one) => one.id === image.id));
    if (isContinued) return show(found, "start");
    generation += 1;
    images = [];
    grid.replaceChildren();
    show(found, "end");
    more.hidden = found.length < PAGE;
  }

  function forget(id) {
    images = images.filter((image) => image.id !== id);
    grid.querySelector(`[data-id="${CSS.escape(id)}"]`)?.remove();
    none.hidden = images.length > 0;
  }

  new IntersectionObserver((entries) => {
    if (!more.hidden && entries.some((entry) => entry.isIntersecting)) load().catch(() => {});
  }, { rootMargin: "400px" }).observe(more);

  async function settingsOf(blob) {
    const form = new FormData();
    form.append("file", blob, "picture.png");
    return api.post("api/settings", form);
  }

  function view(id) {
    let at = images.findIndex((image) => image.id === id);
    if (at < 0) return void refresh().then(() => { if (images.some((image) => image.id === id)) view(id); }, showError);
    const place = h("div", { class: "picture" });
    const facts = h("dl", { class: "facts" });
    const prompt = h("p", { class: "prompt" });
    const counter = h("p", { class: "hint number grow" });
    const before = button("Newer picture", "left", () => go(-1), { kind: "" });
    const after = button("Older picture", "right", () => go(1), { kind: "" });
    const row = h("div", { class: "row wrap" });
    const side = h("div", { class: "stack side" }, h("div", { class: "row" }, counter, before, after), row, prompt, facts);
    const opened = dialog("Picture", h("div", { class: "viewer" }, place, side), [], { kind: "wide" });
    let blob = null;
    let found = null;

    const withBlob = (action) => async () => {
      try {
        const made = await action(await blob);
        if (made !== false) opened.close();
      } catch (error) {
        showError(error);
      }
    };
    async function remove() {
      const image = images[at];
      if (!(await confirm("Delete this picture?", "It is removed from the server. This cannot be undone.", "Delete"))) return;
      try {
        await api.delete(`api/images/${image.id}`);
      } catch (error) {
        if (error.status !== 404) return showError(error);
      }
      forget(image.id);
      announce("Picture deleted");
      if (!images.length) return opened.close();
      at = Math.min(at, images.length - 1);
      render();
    }
    async function download() {
      const link = h("a", { href: URL.createObjectURL(await blob), download: `${images[at].id}.png` });
      link.click();
      setTimeout(() => URL.revokeObjectURL(link.href), 1000);
      return false;
    }
    function render() {
      const image = images[at];
      const isSmall = Math.max(image.width, image.height) <= 128;
      place.replaceChildren(picture(api, image.url, { alt: image.prompt || "Picture", class: isSmall ? "small" : "", loading: "eager" }));
      place.style.setProperty("--ratio", image.width / image.height);
      prompt.textContent = image.prompt || "No prompt";
      counter.textContent = `${at + 1} of ${images.length}${more.hidden ? "" : "+"}`;
      before.disabled = at === 0;
      after.disabled = at === images.length - 1 && more.hidden;
      blob = api.blob(image.url);
      blob.catch(() => {});
      found = blob.then(settingsOf);
      facts.replaceChildren(...terms({ size: `${image.width} × ${image.height}`, seed: image.seed }));
      found.then(({ settings }) => {
        if (images[at] !== image) return;
        const { width, height, prompt: _prompt, ...rest } = settings;
        const changed = Object.entries(rest).filter(([name, value]) => ["seed", "steps", "guidance_scale", "sampler", "schedule", "shift"].includes(name) || (value != null && value !== "" && JSON.stringify(value) !== JSON.stringify(defaults[name])));
        facts.replaceChildren(...terms({ size: `${width ?? image.width} × ${height ?? image.height}`, ...Object.fromEntries(changed) }));
      }, () => {});
    }
    const terms = (values) => Object.entries(values).filter(([, value]) => shown(value) !== "").map(([name, value]) => h("div", {}, h("dt", {}, label(name)), h("dd", {}, shown(value))));
    async function go(step) {
      if (at + step >= images.length && !more.hidden) await load().catch(showError);
      const to = at + step;
      if (to < 0 || to >= images.length) return;
      at = to;
      render();
      announce(`Picture ${at + 1}: ${images[at].prompt || "no prompt"}`);
    }
    row.append(
      h("button", { type: "button", class: "primary", onclick: withBlob(async () => { const { settings, notes } = await found; actions.onReuse(settings, notes); }) }, "Reuse settings"),
      h("button", { type: "button", onclick: () => copy(images[at].prompt ?? "") }, "Copy prompt"),
      h("button", { type: "button", onclick: withBlob((bytes) => actions.onStart(bytes)) }, "Use as start image"),
      actions.onControl ? h("button", { type: "button", onclick: withBlob((bytes) => actions.onControl(bytes)) }, "Use as control picture") : "",
      button("Download", "download", withBlob(download), { kind: "" }),
      button("Delete", "trash", remove, { kind: "danger" }));
    opened.element.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (!step || event.altKey || event.ctrlKey || event.metaKey) return;
      event.preventDefault();
      go(step);
    });
    opened.closed.then(() => grid.querySelector(`[data-id="${CSS.escape(images[at]?.id ?? "")}"] button`)?.focus({ preventScroll: true }));
    render();
  }

  return { element, refresh, open: view, settingsOf };
}
