/** The editor of one picture's captions: saved with Ctrl+S and when another picture is shown. */

import { announce, button, dialog, field, h, newId, picture, showError, toast } from "./ui.js";

const SUGGESTIONS = 24;

const tagsOf = (text) => text.split(",").map((tag) => tag.trim()).filter(Boolean);

/** Return a picture with the part that a bucket keeps, the rest shaded. */
export function cropped(api, entry, crop, size, alt) {
  const image = picture(api, `${entry.thumbnail}&size=${size}`, { alt });
  const frame = h("span", { class: "cropframe" }, image);
  if (entry.width) {
    frame.style.aspectRatio = `${entry.width} / ${entry.height}`;
    frame.style.width = `${Math.min(100, (100 * entry.width) / entry.height)}%`;
  }
  if (crop && (crop.kept_width < 0.999 || crop.kept_height < 0.999)) {
    const kept = h("span", { class: "kept", "aria-hidden": "true" });
    for (const [side, share] of [["left", crop.left], ["top", crop.top], ["width", crop.kept_width], ["height", crop.kept_height]]) {
      kept.style[side] = `${100 * share}%`;
    }
    frame.append(kept);
  }
  return frame;
}

/**
 * Return the editor: {element, id, dirty, show(id), leave(), focus(), suggest()}. leave() saves what is not saved and returns
 * whether the editor may show another picture. `onSaved(entry)`, `onMove(by)`; `tags()` are those of the data set.
 */
export function captionEditor(api, { onSaved, onMove, tags }) {
  let shown = null;
  let texts = [];
  let before = [];
  let crop = 0;
  let asTrained = false;

  const title = h("h2", { class: "grow" });
  const mark = h("span", { class: "badge", role: "status" });
  const image = h("div", { class: "editorimage" });
  const views = h("div", { class: "row wrap", role: "group", "aria-label": "Crop" });
  const notes = h("ul", { class: "stack" });
  const boxes = h("div", { class: "stack" });
  const chips = h("ul", { class: "tagcloud", "aria-label": "Tags of this caption" });
  const suggestions = h("ul", { class: "tagcloud", "aria-label": "Tags to add" });
  const suggestHint = h("p", { class: "label" }, "Add a tag");
  const save = h("button", { type: "button", class: "primary", title: "Ctrl+S", onclick: () => store() }, "Save");
  const undo = button("Discard changes", "undo", () => { texts = [...before]; drawBoxes(); changed(); }, { text: true });
  const element = h("div", { class: "stack editor" },
    h("header", { class: "row" }, title, mark,
      button("Previous picture, Alt+←", "left", () => onMove(-1)), button("Next picture, Alt+→", "right", () => onMove(1))),
    image, views, notes, boxes, chips, suggestHint, suggestions, h("div", { class: "row" }, save, undo));

  element.addEventListener("keydown", (event) => {
    if ((event.ctrlKey || event.metaKey) && event.key.toLowerCase() === "s") store();
    else if (event.altKey && (event.key === "ArrowLeft" || event.key === "ArrowRight")) onMove(event.key === "ArrowLeft" ? -1 : 1);
    else if (event.key === "PageDown" || event.key === "PageUp") onMove(event.key === "PageUp" ? -1 : 1);
    else return;
    event.preventDefault();
  });

  const isDirty = () => texts.some((text, index) => text !== before[index]);

  function changed() {
    const dirty = isDirty();
    mark.textContent = dirty ? "Not saved" : "Saved";
    mark.className = `badge ${dirty ? "warn" : "good"}`;
    mark.hidden = !shown?.captions.some((one) => one.editable);
    save.disabled = undo.disabled = !dirty;
    drawTags();
  }

  function drawImage() {
    const crops = shown.buckets;
    crop = Math.min(crop, Math.max(0, crops.length - 1));
    image.replaceChildren(asTrained && shown.trained[crop]
      ? picture(api, shown.trained[crop], { alt: `${shown.name} as it is trained`, class: "trained" })
      : cropped(api, shown, crops[crop], 1024, shown.name));
    views.replaceChildren(
      ...crops.map((one, index) => h("button", {
        type: "button", class: "chip", "aria-pressed": String(index === crop), onclick: () => { crop = index; drawImage(); views.children[index].focus(); },
      }, one.bucket, one.scale > 1.001 ? h("span", { class: "hint" }, ` enlarged ${one.scale.toFixed(2)}×`) : null)),
      crops.length ? h("label", { class: "check" }, h("input", { type: "checkbox", checked: asTrained, onchange: (event) => { asTrained = event.target.checked; drawImage(); views.querySelector("input").focus(); } }), "As trained") : "");
  }

  function drawNotes() {
    const rows = [
      shown.left_out ? h("li", { class: "error" }, `Not trained: ${shown.left_out}`) : null,
      ...shown.notes.map((note) => h("li", { class: "hint" }, note)),
      shown.width ? h("li", { class: "hint" }, [`${shown.width}×${shown.height}`, shown.examples ? `${shown.examples} ${shown.examples === 1 ? "example" : "examples"} per epoch` : "",
        shown.tokens == null ? "" : `${shown.tokens} of ${shown.token_limit} tokens`, shown.masked ? "with a mask" : "", shown.controls ? `${shown.controls} control ${shown.controls === 1 ? "picture" : "pictures"}` : ""].filter(Boolean).join(", ")) : null,
      shown.tokens > shown.token_limit ? h("li", { class: "error" }, `The caption is cut after ${shown.token_limit} tokens.`) : null,
    ];
    notes.replaceChildren(...rows.filter(Boolean));
  }

  function drawBoxes() {
    boxes.replaceChildren(...shown.captions.map((one, index) => {
      const box = h("textarea", { rows: one.kind === "nl" ? 4 : 5, value: texts[index], readonly: !one.editable, spellcheck: one.kind === "nl", id: newId("caption"), oninput: () => { texts[index] = box.value; changed(); } });
      const name = shown.captions.length === 1 ? "Caption" : one.kind === "nl" ? "Natural language" : shown.captions.filter((each) => each.kind === "tags").length > 1 ? `Caption ${index + 1}` : "Tags";
      return field(name, box, { hint: one.editable ? `in ${one.file}` : one.why }).element;
    }));
  }

  /** The caption whose tags are shown as chips: the first one that can be edited. */
  const tagged = () => shown.captions.findIndex((one) => one.kind === "tags" && one.editable);

  function setTags(index, list) {
    texts[index] = list.join(", ");
    const box = boxes.querySelectorAll("textarea")[index];
    box.value = texts[index];
    changed();
  }

  function drawTags() {
    const index = shown ? tagged() : -1;
    const own = index < 0 ? [] : tagsOf(texts[index]);
    const isList = own.length > 1 || own.every((tag) => tag.length < 40);
    chips.replaceChildren(...(isList ? own : []).map((tag, at) => h("li", {},
      h("button", { type: "button", class: "chip", "aria-label": `Remove ${tag}`, onclick: () => { setTags(index, own.filter((_, other) => other !== at)); (chips.children[Math.min(at, chips.children.length - 1)]?.firstChild ?? save).focus(); } }, `${tag} ×`))));
    chips.hidden = !chips.children.length;
    const there = new Set(own.map((tag) => tag.toLowerCase()));
    const offered = index < 0 ? [] : tags().filter(({ tag }) => !there.has(tag.toLowerCase()) && tag.length < 60).slice(0, SUGGESTIONS);
    suggestions.replaceChildren(...offered.map(({ tag, count }) => h("li", {},
      h("button", { type: "button", class: "chip", "aria-label": `Add ${tag}`, onclick: () => { setTags(index, [...own, tag]); announce(`${tag} added`); } }, `+ ${tag}`, h("span", { class: "hint number" }, ` ${count}`)))));
    suggestions.hidden = suggestHint.hidden = !offered.length;
  }

  async function store(force = false) {
    if (!shown || !isDirty()) return true;
    const { id } = shown;
    try {
      for (const [index, text] of texts.entries()) {
        if (text === before[index]) continue;
        const headers = force ? {} : { "If-Match": `"${shown.version}"` };
        const response = await api.request("PUT", `api/dataset/pictures/${id}/caption`, { body: { text, index }, headers });
        const answer = await response.json();
        if (shown.id !== id) return true;
        Object.assign(shown, answer);
        before[index] = texts[index] = answer.captions[index]?.text ?? text;
      }
      const boxesNow = boxes.querySelectorAll("textarea");
      texts.forEach((text, index) => { if (document.activeElement !== boxesNow[index] && boxesNow[index].value !== text) boxesNow[index].value = text; });
      drawNotes();
      drawImage();
      changed();
      announce("Caption saved");
      onSaved(shown);
      return true;
    } catch (error) {
      if (error.status === 412) return conflict();
      showError(error);
      return false;
    }
  }

  async function conflict() {
    const answer = await dialog("The caption has changed", h("p", {}, "Another program or page has changed this caption since it was shown."),
      [{ label: "Keep editing", value: "" }, { label: "Show what is there now", value: "theirs" }, { label: "Save mine", value: "mine", kind: "primary" }], { kind: "small" }).closed;
    if (answer === "mine") return store(true);
    if (answer === "theirs") await show(shown.id);
    return answer === "theirs";
  }

  async function show(id) {
    const [found] = await Promise.all([api.get(`api/dataset/pictures/${id}`)]);
    if (shown?.id !== id) asTrained = false;
    shown = found;
    before = shown.captions.map((one) => one.text);
    texts = [...before];
    title.textContent = shown.name;
    drawImage();
    drawNotes();
    drawBoxes();
    changed();
  }

  return {
    element,
    show,
    get id() { return shown?.id ?? null; },
    get dirty() { return Boolean(shown) && isDirty(); },
    leave: () => store(),
    focus() { boxes.querySelector("textarea")?.focus({ preventScroll: true }); },
    suggest() { if (shown) drawTags(); },
  };
}
