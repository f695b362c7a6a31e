/**
 * Elements and components of the page, without a framework.
 *
 * h("button", {class: "primary", onclick: draw}, "Draw") makes an element. Classes of style.css: buttons `primary`,
 * `quiet`, `danger`, `icon`; `card`, `row`, `grid`, `hint`, `error`, `badge`, `empty`, `table`, `unseen` (for screen readers).
 */

const SVG = "http://www.w3.org/2000/svg";

const ICONS = {
  moon: "M20 14.500A8.500 8.500 0 1 1 9.500 4a7 7 0 0 0 10.500 10.500z",
  sun: "M12 8a4 4 0 1 0 0 8 4 4 0 0 0 0-8zM12 2v2M12 20v2M4.900 4.900l1.400 1.400M17.700 17.700l1.400 1.400M2 12h2M20 12h2M4.900 19.100l1.400-1.400M17.700 6.300l1.400-1.400",
  auto: "M12 3a9 9 0 1 0 0 18 9 9 0 0 0 0-18zM12 3v18",
  close: "M6 6l12 12M18 6L6 18",
  swap: "M7 4L3 8l4 4M3 8h14M17 12l4 4-4 4M21 16H7",
  dice: "M5 3h14a2 2 0 0 1 2 2v14a2 2 0 0 1-2 2H5a2 2 0 0 1-2-2V5a2 2 0 0 1 2-2zM8 8h.010M16 8h.010M12 12h.010M8 16h.010M16 16h.010",
  plus: "M12 5v14M5 12h14",
  trash: "M4 7h16M9 7V4h6v3M6 7l1 13h10l1-13M10 11v5M14 11v5",
  download: "M12 4v11M7 11l5 5 5-5M5 20h14",
  copy: "M9 9h11v11H9zM5 15H4V4h11v1",
  undo: "M8 5L4 9l4 4M4 9h10a6 6 0 0 1 0 12h-3",
  brush: "M14 6l4 4M4 20l1-5L16 4l4 4L9 19z",
  erase: "M9 19h11M4 14L14 4l6 6-9 9H8z",
  invert: "M12 3a9 9 0 1 0 0 18zM12 3a9 9 0 0 1 0 18",
  left: "M15 5l-7 7 7 7",
  right: "M9 5l7 7-7 7",
  image: "M4 5h16v14H4zM4 16l5-5 4 4 3-3 4 4M15 9h.010",
  again: "M20 12a8 8 0 1 1-2.500-5.800M20 3v4h-4",
  check: "M5 12l5 5 9-10",
  edit: "M14 6l4 4M4 20l1-5L16 4l4 4L9 19z",
  search: "M11 4a7 7 0 1 0 0 14 7 7 0 0 0 0-14zM16 16l5 5",
};

/** Return an element. Properties that start with "on" are listeners; true and false set and leave out an attribute. */
export function h(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value == null || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "class") element.className = value;
    else if (name === "dataset") Object.assign(element.dataset, value);
    else if (name === "value" || name === "checked" || name === "selected") element[name] = value;
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat(Infinity).filter((child) => child != null && child !== false));
  return element;
}

/** Return an icon of `ICONS`, hidden from screen readers. */
export function icon(name) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("viewBox", "0 0 24 24");
  svg.setAttribute("class", "glyph");
  svg.setAttribute("aria-hidden", "true");
  const path = document.createElementNS(SVG, "path");
  path.setAttribute("d", ICONS[name]);
  svg.append(path);
  return svg;
}

/** Return a button with an icon; its label is a tooltip and what screen readers say. `text` shows the label, too. */
export function button(label, glyph, onclick, { kind = "quiet", text = false, ...properties } = {}) {
  const shown = text ? [h("span", {}, label)] : [];
  const name = text ? {} : { "aria-label": label, title: label };
  return h("button", { type: "button", class: `${kind}${text ? "" : " icon"}`, onclick, ...name, ...properties },
    glyph ? icon(glyph) : null, shown);
}

let ids = 0;
/** Return an id that no element has yet. */
export const newId = (word = "id") => `${word}-${++ids}`;

/**
 * Return a labelled control: {element, setError}. `hint` is shown below and read with the control; setError(text) shows what
 * is wrong with it, and "" takes that back.
 */
export function field(label, control, { hint = "", hidden = false } = {}) {
  control.id ||= newId("field");
  const note = h("p", { class: "hint", id: `${control.id}-hint` }, hint);
  const error = h("p", { class: "error", id: `${control.id}-error`, hidden: true });
  const described = () => {
    const names = [hint ? note.id : "", error.hidden ? "" : error.id].filter(Boolean).join(" ");
    if (names) control.setAttribute("aria-describedby", names);
    else control.removeAttribute("aria-describedby");
  };
  const element = h("div", { class: "field" },
    h("label", { for: control.id, class: hidden ? "unseen" : null }, label), control, hint ? note : null, error);
  const setError = (text) => {
    error.textContent = text;
    error.hidden = !text;
    if (text) control.setAttribute("aria-invalid", "true");
    else control.removeAttribute("aria-invalid");
    described();
  };
  described();
  return { element, control, setError };
}

/** Return a <select> of these values; `shown` says how each is called. */
export function select(values, value, properties = {}, shown = (name) => name) {
  const element = h("select", properties, values.map((name) => h("option", { value: name }, shown(name))));
  element.value = value;
  return element;
}

/** Let screen readers say this when they are idle, or at once if `urgent`. */
export function announce(text, urgent = false) {
  const region = document.getElementById(urgent ? "assertive" : "polite");
  if (region) region.textContent = text;
}

/** Show a line for some seconds, or until closed if it is an error; `action` is {label, run}. */
export function toast(text, { kind = "info", action = null } = {}) {
  const place = document.getElementById("toasts");
  for (const old of place.children) if (old.dataset.text === text) old.remove();
  const close = () => element.remove();
  const element = h("div", { class: `toast ${kind}`, dataset: { text } }, h("p", {}, text),
    action ? h("button", { type: "button", onclick: () => { close(); action.run(); } }, action.label) : null,
    button("Close message", "close", close));
  place.append(element);
  while (place.children.length > 4) place.firstChild.remove();
  announce(text, kind === "error");
  if (kind !== "error") setTimeout(close, action ? 10000 : 6000);
  return close;
}

/**
 * Open a modal dialog and return {element, close, closed}: `closed` is a promise of what `close(value)` was called with,
 * null after Esc. `body` is an element or text; `actions` are {label, value, kind}.
 */
export function dialog(title, body, actions = [], { kind = "" } = {}) {
  const id = newId("dialog");
  const element = h("dialog", { class: `dialog ${kind}`, "aria-labelledby": id });
  let result = null;
  const close = (value = null) => { result = value; element.close(); };
  element.append(
    h("header", {}, h("h2", { id }, title), button("Close", "close", () => close())),
    h("div", { class: "body" }, body),
    actions.length ? h("footer", {}, actions.map(({ label, value, kind: style = "" }) =>
      h("button", { type: "button", class: style, onclick: () => close(value) }, label))) : "");
  element.addEventListener("click", (event) => { if (event.target === element) close(); });
  document.body.append(element);
  const closed = new Promise((resolve) => element.addEventListener("close", () => { element.remove(); resolve(result); }));
  element.showModal();
  return { element, close, closed };
}

/** Ask whether to go on; a promise of true or false. */
export async function confirm(title, text, action = "OK", kind = "danger") {
  const actions = [{ label: "Cancel", value: false }, { label: action, value: true, kind }];
  return (await dialog(title, h("p", {}, text), actions, { kind: "small" }).closed) === true;
}

/** Show an ApiError or any other error in one line. */
export function showError(error) {
  if (error?.name === "AbortError") return;
  toast(error?.message || String(error), { kind: "error" });
}

/** Return an <img> of a picture of the server, loaded when it comes near the screen. */
export function picture(api, path, properties = {}) {
  const element = h("img", { loading: "lazy", decoding: "async", ...properties });
  const load = () => api.image(path).then((source) => { element.src = source; }, () => element.classList.add("missing"));
  element.addEventListener("error", () => element.classList.add("missing"));
  if (!api.key || !("IntersectionObserver" in window)) load();
  else {
    const seen = new IntersectionObserver((entries) => {
      if (!entries.some((entry) => entry.isIntersecting)) return;
      seen.disconnect();
      load();
    }, { rootMargin: "300px" });
    seen.observe(element);
  }
  return element;
}

/** Values that survive a reload, in the browser's storage under "anima." + name. */
export const stored = {
  get(name, otherwise = null) {
    try {
      return JSON.parse(localStorage.getItem(`anima.${name}`)) ?? otherwise;
    } catch {
      return otherwise;
    }
  },
  set(name, value) {
    try {
      if (value == null) localStorage.removeItem(`anima.${name}`);
      else localStorage.setItem(`anima.${name}`, JSON.stringify(value));
    } catch { /* full, or none */ }
  },
};
