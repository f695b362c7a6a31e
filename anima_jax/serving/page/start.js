/** Start image, mask and control pictures: the sections of the form with pictures in them. */

import { dataUrl, kept, slot } from "./pictures.js";
import { editMask } from "./mask.js";
import { button, field, h, newId, select, showError, stored } from "./ui.js";

/** The start image with its mask: {element, note(), request(), set(blob), write(settings)}. */
export function startImage(api, { onchange, onSize, usual, limits = {} }) {
  const place = slot("start image", api, (blob) => changed(blob));
  const denoise = h("input", { type: "range", min: 0.05, max: 1, step: 0.01, value: 0.6 });
  const amount = h("input", { type: "number", min: 0, max: 1, step: "any", value: 0.6, "aria-label": "Denoise, as a number" });
  const strength = field("Denoise", h("div"), {});
  strength.element.replaceChildren(h("label", { for: (denoise.id = newId("denoise")) }, "Denoise"), h("div", { class: "row" }, denoise, amount),
    h("p", { class: "hint" }, "How much is drawn again: 0 keeps the picture, 1 only its mask."));
  const preview = h("img", { class: "mask-preview", alt: "Mask" });
  const paint = h("button", { type: "button", onclick: () => { edited = edit(); } }, "Paint a mask");
  const drop = button("Remove mask", "trash", () => { setMask(null); paint.focus(); onchange(); });
  const paste = h("input", { type: "checkbox", id: newId("paste"), checked: true });
  const feather = h("input", { type: "number", min: 0, max: 512, step: 1, value: 8 });
  const edges = h("div", { class: "stack tight" },
    h("label", { class: "check", for: paste.id }, paste, "Keep the pixels outside the mask exactly"),
    field("Soft edge in pixels", feather).element);
  const useSize = h("button", { type: "button", onclick: () => onSize(...fitting(place.size)) }, "Use its size");
  const details = h("div", { class: "stack", hidden: true }, h("div", { class: "row wrap" }, useSize, paint, drop), preview, edges, strength.element);
  const element = h("div", { class: "stack" }, place.element, details);
  let mask = null;
  let edited = Promise.resolve();

  function fitting([width, height]) {
    const most = limits.max_size ?? 2048;
    const area = 1.5 * (usual[0] || 1024) * (usual[1] || 1024); // a larger picture is drawn in its shape
    const scale = Math.min(1, most / Math.max(width, height), Math.sqrt(area / (width * height)));
    return [width, height].map((side) => Math.max(16, Math.round((side * scale) / 16) * 16));
  }
  function keep() {
    stored.set("start", { denoise: amount.value, paste: paste.checked, feather: feather.value });
  }
  function setMask(blob) {
    mask = blob;
    if (preview.src) URL.revokeObjectURL(preview.src);
    if (blob) preview.src = URL.createObjectURL(blob);
    preview.hidden = drop.hidden = edges.hidden = !blob;
    paint.textContent = blob ? "Edit mask" : "Paint a mask";
    kept.set("mask", blob);
  }
  function changed(blob) {
    details.hidden = !blob;
    setMask(null);
    kept.set("start", blob);
    onchange();
  }
  async function edit() {
    paint.disabled = true; // until the editor is open, which a second press would open again
    try {
      const made = await editMask(place.blob, mask);
      if (made === undefined) return;
      setMask(made);
      onchange();
    } catch (error) {
      showError(error);
    } finally {
      paint.disabled = false;
      paint.focus();
    }
  }
  denoise.addEventListener("input", () => { amount.value = denoise.value; });
  amount.addEventListener("input", () => { denoise.value = amount.value; });
  element.addEventListener("input", keep);

  const before = stored.get("start", {});
  if (before.denoise) amount.value = denoise.value = before.denoise;
  if (before.paste != null) paste.checked = before.paste;
  if (before.feather) feather.value = before.feather;
  setMask(null);
  const restored = Promise.all([kept.get("start"), kept.get("mask")]).then(async ([blob, painted]) => {
    if (!blob || place.blob) return;
    await place.set(blob);
    details.hidden = false;
    setMask(painted ?? null);
    onchange();
  }).catch(() => {});

  return {
    element,
    restored,
    note: () => (!place.blob ? "" : mask ? "Inpainting" : "In use"),
    async set(blob) {
      await (place.ready = place.set(blob));
      changed(place.blob);
    },
    write(values) {
      if (values.denoise != null) amount.value = denoise.value = values.denoise;
      if (values.paste != null) { paste.checked = true; feather.value = values.paste; }
    },
    setError: (text) => strength.setError(text),
    /** Return the part of a request that is about the start image. */
    async request() {
      await Promise.all([restored, place.ready, edited]); // a large picture or mask takes a moment
      if (!place.blob) return {};
      const found = { image: await dataUrl(place.blob), denoise: Number(amount.value || 1) };
      if (!mask) return found;
      return { ...found, mask: await dataUrl(mask), ...(paste.checked ? { paste: Number(feather.value || 0) } : {}) };
    },
  };
}

/** Control networks with their pictures: {element, note(), request(), use(blob)}. */
export function controlPictures(api, networks, preprocessors, { onchange }) {
  const names = networks.map((row) => row.name ?? row);
  const rows = [];
  const list = h("ul", { class: "controls" });
  const add = button("Add control", "plus", () => { append(); keep(); rows.at(-1).network.focus(); }, { kind: "", text: true });
  const element = h("div", { class: "stack" }, list, h("p", {}, add));
  const kinds = preprocessors.map((row) => row.name ?? row);

  function append(values = {}) {
    const id = newId("control");
    const place = slot("control picture", api, (blob) => { kept.set(`control ${rows.indexOf(row)}`, blob); onchange(); });
    const network = select(names, values.name ?? names[0]);
    const kind = select(["", ...kinds], values.kind ?? "", {}, (name) => name ? name[0].toUpperCase() + name.slice(1) : "Picture as it is");
    const [strength, start, end] = [["strength", 1], ["start", 0], ["end", 1]].map(([name, usual]) =>
      h("input", { type: "number", step: 0.05, ...(name === "strength" ? {} : { min: 0, max: 1 }), value: values[name] ?? usual }));
    const remove = button("Remove control", "trash", () => {
      rows.splice(rows.indexOf(row), 1);
      row.element.remove();
      rows.forEach((other, index) => kept.set(`control ${index}`, other.place.blob));
      keep();
      add.focus();
    });
    const row = { place, network, kind, strength, start, end };
    const group = h("div", { class: "stack control", role: "group", "aria-labelledby": id },
      h("div", { class: "row" }, h("h3", { id, class: "grow" }, "Control network"), remove),
      field("Network", network, { hidden: true }).element, place.element,
      kinds.length ? field("Make it from the picture", kind).element : null,
      h("div", { class: "thirds" }, field("Strength", strength).element, field("From", start).element, field("To", end).element));
    row.element = h("li", {}, group);
    rows.push(row);
    list.append(row.element);
    return row;
  }
  function keep() {
    stored.set("controls", rows.map(plain));
    onchange();
  }
  const plain = (row) => ({
    name: row.network.value, strength: Number(row.strength.value), start: Number(row.start.value), end: Number(row.end.value), ...(row.kind.value ? { kind: row.kind.value } : {}),
  });
  element.addEventListener("input", keep);
  element.addEventListener("change", keep);

  stored.get("controls", []).filter(({ name }) => names.includes(name)).forEach((values, index) => {
    const row = append(values);
    row.place.ready = kept.get(`control ${index}`).then((blob) => blob && row.place.set(blob)).then(onchange).catch(() => {});
  });
  return {
    element,
    note: () => (rows.length ? `${rows.length} in use` : ""),
    async use(blob) {
      const row = rows.find(({ place }) => !place.blob) ?? append();
      await row.place.set(blob);
      kept.set(`control ${rows.indexOf(row)}`, row.place.blob);
      keep();
    },
    /** Return the part of a request that is about control networks. Throws an Error if one has no picture. */
    async request() {
      await Promise.all(rows.map(({ place }) => place.ready));
      const empty = rows.find(({ place }) => !place.blob);
      if (empty) throw new Error(`The control network ${empty.network.value} has no picture yet.`);
      const controls = await Promise.all(rows.map(async (row) => ({ ...plain(row), image: await dataUrl(row.place.blob) })));
      return controls.length ? { controls } : {};
    },
  };
}
