/** Pictures that a person gives: places to drop, paste or choose them, and the browser's storage, in which they survive a reload. */

import { button, h, newId, showError } from "./ui.js";

/** Type of what a picture of the gallery carries while it is dragged: its path on the server. */
export const DRAGGED = "application/x-anima-picture";

/** Pixels of a picture that is used as it is: a camera's are more than a request may contain or a drawing can show. */
const LARGEST = 8e6;

/** Pictures by name, in IndexedDB. A browser that has none keeps nothing. */
export const kept = {
  async run(mode, action) {
    const database = await new Promise((resolve, reject) => {
      const opening = indexedDB.open("anima", 1);
      opening.onupgradeneeded = () => opening.result.createObjectStore("pictures");
      opening.onsuccess = () => resolve(opening.result);
      opening.onerror = () => reject(opening.error);
    });
    try {
      return await new Promise((resolve, reject) => {
        const request = action(database.transaction("pictures", mode).objectStore("pictures"));
        request.onsuccess = () => resolve(request.result);
        request.onerror = () => reject(request.error);
      });
    } finally {
      database.close();
    }
  },
  get(name) { return this.run("readonly", (store) => store.get(name)).catch(() => null); },
  set(name, value) {
    return this.run("readwrite", (store) => (value == null ? store.delete(name) : store.put(value, name))).catch(() => null);
  },
};

/** Return a picture's bytes as a data URL, as requests contain them. */
export function dataUrl(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(new Error("This file cannot be read."));
    reader.readAsDataURL(blob);
  });
}

/** Return the picture as a drawable bitmap, upright. Throws an Error if the browser cannot read it. */
export async function bitmap(blob) {
  try {
    return await createImageBitmap(blob, { imageOrientation: "from-image" });
  } catch {
    throw new Error("This file is not a picture that the browser can read.");
  }
}

/** Return a picture as it is, or scaled down and upright if it has more than `LARGEST` pixels; and its size. */
async function sized(blob) {
  const source = await bitmap(blob);
  try {
    const scale = Math.sqrt(LARGEST / (source.width * source.height));
    if (scale >= 1) return { blob, size: [source.width, source.height] };
    const size = [source.width, source.height].map((side) => Math.max(1, Math.floor(side * scale)));
    const canvas = h("canvas", { width: size[0], height: size[1] });
    const context = canvas.getContext("2d");
    context.imageSmoothingQuality = "high";
    context.drawImage(source, 0, 0, ...size);
    return { blob: await new Promise((resolve) => canvas.toBlob(resolve, "image/png")), size };
  } finally {
    source.close();
  }
}

/** Return the picture that was dropped or pasted, a Blob, or null. One of the gallery is fetched from the server. */
export async function transferred(data, api) {
  const path = data.getData(DRAGGED);
  if (path) return api.blob(path);
  return [...data.files].find((file) => file.type.startsWith("image/") || /\.(png|jpe?g|webp|avif|gif|bmp)$/i.test(file.name)) ?? null;
}

/** Whether something that is dragged may be a picture. */
export const mayBePicture = (data) => data.types.includes(DRAGGED) || data.types.includes("Files");

/**
 * A place for one picture: {element, blob, size, ready, set(blob)}; `ready` is a promise that its picture is there. `onchange` is called with the blob, or null if it was removed.
 * The picture can be dropped, pasted while the place has the focus, or chosen as a file.
 */
export function slot(label, api, onchange) {
  const input = h("input", { type: "file", accept: "image/*", class: "unseen", tabindex: -1, id: newId("file"), "aria-label": label });
  const choose = h("button", { type: "button", onclick: () => input.click() }, `Choose ${label}`);
  const shown = h("img", { alt: label });
  const facts = h("span", { class: "hint" });
  const empty = h("div", { class: "slot-empty" }, choose, h("span", { class: "hint" }, "or drop or paste it here"));
  const full = h("div", { class: "row slot-full", hidden: true }, shown, h("div", { class: "grow stack tight" }, facts,
    h("div", { class: "row wrap" }, h("button", { type: "button", onclick: () => input.click() }, "Replace"),
      button(`Remove ${label}`, "trash", () => { place.set(null); onchange(null); choose.focus(); }))));
  const element = h("div", { class: "slot", role: "group", "aria-label": label }, input, empty, full);
  const place = { element, blob: null, size: null, ready: Promise.resolve() };

  place.set = async (blob) => {
    if (blob) ({ blob, size: place.size } = await sized(blob));
    if (shown.src) URL.revokeObjectURL(shown.src);
    place.blob = blob;
    if (blob) {
      shown.src = URL.createObjectURL(blob);
      facts.textContent = `${place.size[0]} × ${place.size[1]}`;
    } else {
      place.size = null;
      shown.removeAttribute("src");
    }
    empty.hidden = Boolean(blob);
    full.hidden = !blob;
  };

  function take(promise) {
    place.ready = taken(promise);
  }

  async function taken(promise) {
    try {
      const blob = await promise;
      if (!blob) return;
      await place.set(blob);
      onchange(place.blob);
    } catch (error) {
      showError(error);
    }
  }

  input.addEventListener("change", () => { take(input.files[0]); input.value = ""; });
  element.addEventListener("paste", (event) => {
    if (![...event.clipboardData.files].length) return;
    event.preventDefault();
    event.stopPropagation();
    take(transferred(event.clipboardData, api));
  });
  element.addEventListener("dragover", (event) => {
    if (!mayBePicture(event.dataTransfer)) return;
    event.preventDefault();
    event.stopPropagation();
    element.classList.add("over");
  });
  element.addEventListener("dragleave", () => element.classList.remove("over"));
  element.addEventListener("drop", (event) => {
    event.preventDefault();
    event.stopPropagation();
    element.classList.remove("over");
    document.dispatchEvent(new Event("dragend"));
    take(transferred(event.dataTransfer, api));
  });
  return place;
}
