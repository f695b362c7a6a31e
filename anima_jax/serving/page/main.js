/**
 * The frame: tabs, theme, whether the server answers, and the question for its API key.
 *
 * A tab is a module with `mount(element, api)`, loaded when it is first shown. Any of them may dispatch on `document`
 * "anima:draw" with detail {settings, notes}: the Draw tab opens with these settings; and "anima:models": the server has
 * another model or other LoRAs now.
 */

import { api } from "./api.js";
import { announce, dialog, field, h, icon, showError } from "./ui.js";

const TABS = { draw: "./draw.js", run: "./run.js", data: "./data.js" };
const MISSING = {
  run: ["No run to show", "Start the server with --run and the folder of a training run to see its curves, samples and checkpoints here."],
  data: ["No data set to show", "Start the server with --dataset and a dataset TOML or a folder of pictures to see its captions, buckets and crops here."],
};
const loaded = new Map();

async function fill(name) {
  const panel = document.getElementById(name);
  try {
    if (name !== "draw") {
      const models = await api.get("api/models");
      if (!models[name === "run" ? "run" : "dataset"]) return void panel.replaceChildren(...empty(...MISSING[name]));
    }
    const { mount } = await import(TABS[name]);
    panel.replaceChildren();
    await mount(panel, api);
  } catch (error) {
    loaded.delete(name);
    panel.replaceChildren(...empty("This did not load", error.message),
      h("p", { class: "empty" }, h("button", { type: "button", onclick: () => show(name) }, "Try again")));
  }
}

function empty(title, text) {
  return [h("div", { class: "empty" }, h("h2", {}, title), h("p", {}, text))];
}

/** Return the tab that the address names, as in #/run. */
const ofAddress = () => location.hash.replace(/^#\/?/, "");

/** Show a tab. */
function show(name, focus = false) {
  for (const other of Object.keys(TABS)) {
    const tab = document.getElementById(`tab-${other}`);
    tab.setAttribute("aria-selected", String(other === name));
    tab.tabIndex = other === name ? 0 : -1;
    document.getElementById(other).hidden = other !== name;
    if (other === name && focus) tab.focus();
  }
  document.title = `${document.getElementById(`tab-${name}`).textContent} · Anima`;
  if (ofAddress() !== name) history.replaceState(null, "", `#/${name}`); // "#draw" would move the focus to that element
  if (!loaded.has(name)) loaded.set(name, fill(name));
  return loaded.get(name);
}

function tabs() {
  const names = Object.keys(TABS);
  const list = document.querySelector("[role=tablist]");
  list.addEventListener("click", (event) => {
    const tab = event.target.closest("[role=tab]");
    if (tab) show(tab.id.slice(4));
  });
  list.addEventListener("keydown", (event) => {
    const at = names.indexOf(document.activeElement.id?.slice(4));
    const to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: names.length - 1 }[event.key];
    if (at < 0 || to === undefined) return;
    event.preventDefault();
    show(names[(to + names.length) % names.length], true);
  });
  addEventListener("hashchange", () => { if (names.includes(ofAddress())) show(ofAddress()); });
  document.addEventListener("anima:draw", async (event) => {
    await show("draw");
    document.dispatchEvent(new CustomEvent("anima:settings", { detail: event.detail }));
  });
  return show(names.includes(ofAddress()) ? ofAddress() : "draw");
}

const THEMES = { "": ["System theme", "auto"], light: ["Light theme", "sun"], dark: ["Dark theme", "moon"] };

function theme() {
  const control = document.getElementById("theme");
  const names = Object.keys(THEMES);
  const draw = () => {
    const [label, glyph] = THEMES[document.documentElement.dataset.theme ?? ""];
    control.replaceChildren(icon(glyph));
    control.setAttribute("aria-label", `${label}, change`);
    control.title = `${label}, change`;
  };
  control.addEventListener("click", () => {
    const next = names[(names.indexOf(document.documentElement.dataset.theme ?? "") + 1) % names.length];
    if (next) document.documentElement.dataset.theme = next;
    else delete document.documentElement.dataset.theme;
    try {
      localStorage.setItem("anima.theme", next);
    } catch { /* a browser without storage */ }
    draw();
    announce(THEMES[next][0]);
  });
  draw();
}

function server() {
  const place = document.getElementById("server");
  const say = (text, kind) => { place.textContent = text; place.dataset.kind = kind; };
  let lost = false;
  api.addEventListener("offline", () => { lost = true; say("Server is away, trying to reach it…", "bad"); });
  api.addEventListener("loading", () => say("The server is loading its model…", ""));
  api.addEventListener("online", () => {
    say(lost ? "Connected again" : "", "good");
    lost = false;
    setTimeout(() => { if (api.online) say("", ""); }, 4000);
    for (const [name, done] of loaded) done.then(() => { if (!loaded.has(name) && !document.getElementById(name).hidden) show(name); });
  });
}

function askKey(wrong) {
  const input = h("input", { type: "password", autocomplete: "current-password", required: true });
  const remember = h("input", { type: "checkbox", id: "remember-key" });
  const { element, setError } = field("API key", input);
  const form = h("form", { method: "dialog" },
    h("p", {}, "This server was started with --api_key. Enter its key to use it."), element,
    h("label", { class: "check", for: "remember-key" }, remember, "Remember it in this browser"),
    h("p", { class: "actions" }, h("button", { class: "primary", type: "submit" }, "Use key")));
  if (wrong) setError("The server does not accept this key.");
  const opened = dialog("API key", form, [], { kind: "small" });
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    if (!input.value) return;
    api.setKey(input.value, remember.checked);
    opened.close(input.value);
  });
  input.focus();
  return opened.closed;
}

api.askKey = askKey;
theme();
server();
tabs().catch(showError);
