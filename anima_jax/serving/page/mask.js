/**
 * The mask editor: a brush over the picture, white where it is drawn again.
 *
 * What was painted is a list of operations, drawn anew for each undo. Keys: the arrows move a cursor on the focused picture, Space
 * paints there (held with Shift, moving paints), [ and ] change the brush, E switches to the eraser, Ctrl+Z takes back.
 */

import { announce, button, dialog, field, h, icon } from "./ui.js";
import { bitmap } from "./pictures.js";

const PAINT = [255, 46, 196];

/** Draw one operation on the mask: a stroke, the inversion, the removal of all, or an earlier mask. */
function apply(context, operation) {
  const { width, height } = context.canvas;
  context.globalCompositeOperation = { erase: "destination-out", invert: "xor" }[operation.kind] ?? "source-over";
  context.fillStyle = context.strokeStyle = `rgb(${PAINT})`;
  if (operation.kind === "clear") context.clearRect(0, 0, width, height);
  else if (operation.kind === "invert") context.fillRect(0, 0, width, height);
  else if (operation.kind === "mask") context.drawImage(operation.image, 0, 0, width, height);
  else {
    const [[x, y], ...rest] = operation.points;
    context.lineWidth = operation.size;
    context.lineCap = context.lineJoin = "round";
    context.beginPath();
    context.moveTo(x, y);
    for (const point of rest.length ? rest : [[x + 0.01, y]]) context.lineTo(...point);
    context.stroke();
  }
}

/** Return a mask, white on black, as a canvas whose painted pixels are opaque. */
async function painted(mask, width, height) {
  const canvas = h("canvas", { width, height });
  const context = canvas.getContext("2d");
  const source = await bitmap(mask);
  context.drawImage(source, 0, 0, width, height);
  source.close();
  const pixels = context.getImageData(0, 0, width, height);
  for (let at = 0; at < pixels.data.length; at += 4) {
    pixels.data[at + 3] = pixels.data[at];
    PAINT.forEach((value, channel) => { pixels.data[at + channel] = value; });
  }
  context.putImageData(pixels, 0, 0);
  return canvas;
}

/** Return the painted canvas as a PNG, white on black, or null if nothing is painted. */
function exported(canvas) {
  const { width, height } = canvas;
  const pixels = canvas.getContext("2d").getImageData(0, 0, width, height);
  let any = false;
  for (let at = 0; at < pixels.data.length; at += 4) {
    const value = pixels.data[at + 3] > 127 ? 255 : 0;
    any ||= value > 0;
    pixels.data.set([value, value, value, 255], at);
  }
  if (!any) return null;
  const out = h("canvas", { width, height });
  out.getContext("2d").putImageData(pixels, 0, 0);
  return new Promise((resolve) => out.toBlob(resolve, "image/png"));
}

/** Open the editor on a picture. Returns a promise of the mask's PNG, null if it is empty, undefined if it was not changed. */
export async function editMask(picture, mask) {
  const source = await bitmap(picture);
  const { width, height } = source;
  const canvas = h("canvas", { width, height, class: "base", "aria-hidden": "true" });
  canvas.getContext("2d").drawImage(source, 0, 0);
  source.close();
  const layer = h("canvas", { width, height, class: "layer", tabindex: 0, role: "application", "aria-roledescription": "mask editor" });
  layer.setAttribute("aria-label", "Mask. Arrow keys move the brush, Space paints, Shift with arrows paints a line, brackets change its size, E erases.");
  const context = layer.getContext("2d", { willReadFrequently: true });
  const cursor = h("div", { class: "cursor", hidden: true });
  const frame = h("div", { class: "frame" }, canvas, layer, cursor);
  const start = mask ? [{ kind: "mask", image: await painted(mask, width, height) }] : [];
  let operations = [...start];
  let stroke = null;
  let erasing = false;
  let at = [width / 2, height / 2];

  const longest = Math.max(width, height);
  const size = h("input", { type: "range", min: Math.max(1, Math.round(longest / 128)), max: Math.round(longest / 2), value: Math.round(longest / 12) });
  const sizeField = field("Brush size", size);
  const tools = [["Brush", "brush", false], ["Eraser", "erase", true]].map(([label, glyph, erases]) =>
    h("button", { type: "button", "aria-pressed": String(!erases), onclick: () => choose(erases) }, icon(glyph), label));
  const undo = button("Undo", "undo", () => { operations.pop(); redraw(); }, { kind: "" });
  const bar = h("div", { class: "row wrap tools", role: "toolbar", "aria-label": "Mask tools" }, tools, sizeField.element, undo,
    button("Invert", "invert", () => push({ kind: "invert" }), { kind: "" }), button("Clear", "trash", () => push({ kind: "clear" }), { kind: "" }));
  const hint = h("p", { class: "hint" }, "Painted parts are drawn again, the rest is kept. Keys: arrows move, Space paints, Shift with arrows draws, [ and ] change the size.");
  const body = h("div", { class: "stack mask-editor" }, bar, frame, hint);
  frame.style.setProperty("--ratio", width / height);

  function choose(erases) {
    erasing = erases;
    tools.forEach((tool, index) => tool.setAttribute("aria-pressed", String(erases === Boolean(index))));
  }
  function redraw() {
    context.globalCompositeOperation = "source-over";
    context.clearRect(0, 0, width, height);
    for (const operation of operations) apply(context, operation);
    undo.disabled = operations.length <= start.length && !(start.length && operations.length);
  }
  function push(operation) {
    operations.push(operation);
    apply(context, operation);
    undo.disabled = false;
  }
  function begin(point) {
    stroke = { kind: erasing ? "erase" : "paint", size: Number(size.value), points: [point] };
    push(stroke);
  }
  function extend(point) {
    const last = stroke.points.at(-1);
    stroke.points.push(point);
    apply(context, { ...stroke, points: [last, point] });
  }
  function place(event) {
    const box = layer.getBoundingClientRect();
    return [((event.clientX - box.left) / box.width) * width, ((event.clientY - box.top) / box.height) * height];
  }
  function showCursor([x, y]) {
    at = [x, y];
    cursor.hidden = false;
    cursor.style.left = `${(x / width) * 100}%`;
    cursor.style.top = `${(y / height) * 100}%`;
    cursor.style.width = `${(Number(size.value) / width) * 100}%`;
  }

  layer.addEventListener("pointerdown", (event) => {
    if (event.button) return;
    layer.setPointerCapture(event.pointerId);
    begin(place(event));
    event.preventDefault();
    layer.focus();
  });
  layer.addEventListener("pointermove", (event) => {
    showCursor(place(event));
    if (!stroke || !layer.hasPointerCapture(event.pointerId)) return;
    for (const one of event.getCoalescedEvents?.() ?? [event]) extend(place(one));
  });
  for (const end of ["pointerup", "pointercancel"]) layer.addEventListener(end, () => { stroke = null; });
  layer.addEventListener("pointerleave", () => { if (document.activeElement !== layer) cursor.hidden = true; });
  layer.addEventListener("focus", () => { if (layer.matches(":focus-visible")) showCursor(at); });
  layer.addEventListener("blur", () => { cursor.hidden = true; });
  size.addEventListener("input", () => showCursor(at));

  body.addEventListener("keydown", (event) => {
    const moves = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    const onLayer = document.activeElement === layer;
    if (event.key.toLowerCase() === "z" && (event.ctrlKey || event.metaKey)) undo.click();
    else if (event.ctrlKey || event.metaKey || event.altKey) return;
    else if (moves && onLayer) {
      const pace = Math.max(1, Number(size.value) / 3);
      const to = [Math.min(width, Math.max(0, at[0] + moves[0] * pace)), Math.min(height, Math.max(0, at[1] + moves[1] * pace))];
      if (event.shiftKey) { if (!stroke) begin(at); extend(to); } else stroke = null;
      showCursor(to);
    } else if (event.key === " " && onLayer) {
      begin(at);
      stroke = null;
      announce(`${erasing ? "Erased" : "Painted"} at ${Math.round((at[0] / width) * 100)} % across, ${Math.round((at[1] / height) * 100)} % down`);
    } else if ((event.key === "[" || event.key === "]") && event.target.type !== "text") {
      size.value = Number(size.value) * (event.key === "]" ? 1.25 : 0.8);
      showCursor(at);
    } else if (event.key.toLowerCase() === "e" && onLayer) choose(!erasing);
    else return;
    event.preventDefault();
  });
  layer.addEventListener("keyup", (event) => { if (event.key === "Shift") stroke = null; });

  redraw();
  const opened = dialog("Paint a mask", body, [{ label: "Cancel" }, { label: "Use mask", value: true, kind: "primary" }], { kind: "wide" });
  layer.focus();
  return (await opened.closed) ? exported(layer) : undefined;
}
