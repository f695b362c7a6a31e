/**
 * The settings of a drawing as a form. Their names are those of the API (POST /api/jobs), so that reading the form gives the body
 * of a request and writing settings, from a file or from the last visit, needs no translation.
 */

import { button, field, h, newId, select } from "./ui.js";
import { loraList } from "./loras.js";

const NOISE = ["torch-cpu", "torch-cuda", "jax"];
const CACHES = { "": "Off", easy: "EasyCache", first_block: "First block cache" };
const RATIOS = [[1, 1], [4, 3], [3, 2], [16, 9], [21, 9], [5, 4], [2, 1]];

const equal = (one, other) => JSON.stringify(one ?? null) === JSON.stringify(other ?? null);
const sentence = (name) => name[0].toUpperCase() + name.slice(1).replaceAll("_", " ");

function ratio(width, height) {
  const found = RATIOS.find(([a, b]) => Math.abs(Math.max(width, height) / Math.min(width, height) - a / b) < 0.03);
  if (!found) return "";
  return width < height ? ` · ${found[1]}:${found[0]}` : ` · ${found[0]}:${found[1]}`;
}

/** A control of one setting: `get` its value (undefined: leave it out), `set` one, `error` shows what is wrong with it. */
class Setting {
  constructor(label, control, { get, set, ...options }) {
    Object.assign(this, field(label, control, options));
    this.get = get ?? (() => control.value);
    this.set = set ?? ((value) => { control.value = value ?? ""; });
  }
}

function number(label, { min, max, step = "any", hint = "", placeholder = "" } = {}) {
  const control = h("input", { type: "number", min, max, step, placeholder, inputmode: "decimal" });
  return new Setting(label, control, { hint, get: () => (control.value === "" ? null : Number(control.value)) });
}

function flag(label, hint = "") {
  const control = h("input", { type: "checkbox", id: newId("flag") });
  const text = h("span", {}, label, hint ? h("span", { class: "hint" }, ` ${hint}`) : null);
  const element = h("label", { class: "check", for: control.id }, control, text);
  return { element, control, setError: () => {}, get: () => control.checked, set: (value) => { control.checked = Boolean(value); } };
}

function choice(label, values, shown = undefined) {
  const control = select(values, values[0], {}, shown);
  const set = (value) => {
    if (value != null && ![...control.options].some((option) => option.value === String(value)))
      control.append(h("option", { value }, value));
    control.value = value ?? "";
  };
  return new Setting(label, control, { set });
}

/** Two numbers from 0 to 1: where in the sampling something acts. */
function interval(label) {
  const [from, to] = ["from", "to"].map((end) => h("input", { type: "number", min: 0, max: 1, step: 0.05, "aria-label": `${label}, ${end}` }));
  const error = h("p", { class: "error", hidden: true });
  const element = h("div", { class: "field", role: "group", "aria-label": label },
    h("span", { class: "label" }, label), h("div", { class: "row" }, from, h("span", { class: "muted", "aria-hidden": "true" }, "–"), to), error);
  return {
    element,
    control: from,
    setError: (text) => { error.textContent = text; error.hidden = !text; },
    get: () => (from.value === "" && to.value === "" ? null : [Number(from.value || 0), Number(to.value === "" ? 1 : to.value)]),
    set: (value) => { [from.value, to.value] = value ?? ["", ""]; },
  };
}

function numbers(label, hint) {
  const control = h("input", { type: "text", inputmode: "decimal" });
  const get = () => control.value.split(/[\s,;]+/).filter(Boolean).map(Number);
  return new Setting(label, control, { hint, get, set: (value) => { control.value = (value ?? []).join(", "); } });
}

function seed(onReuse) {
  const name = newId("seed");
  const control = h("input", { type: "text", inputmode: "numeric", pattern: "[0-9]*", maxlength: 20, autocomplete: "off" });
  const modes = ["Random", "Fixed"].map((label) => {
    const radio = h("input", { type: "radio", name, value: label, id: newId("seed"), class: "unseen" });
    return { radio, label: h("label", { for: radio.id }, label) };
  });
  const [random, fixed] = modes.map(({ radio }) => radio);
  const made = field("Seed", control, { hidden: true });
  const show = () => { control.disabled = random.checked; control.placeholder = random.checked ? "Random" : "0"; };
  const again = button("Use the last seed", "again", () => onReuse());
  for (const radio of [random, fixed]) radio.addEventListener("change", () => { show(); if (fixed.checked) control.focus(); });
  random.checked = true;
  show();
  const element = h("fieldset", { class: "seed" }, h("legend", {}, "Seed"),
    h("div", { class: "row" },
      h("div", { class: "segments" }, modes.map(({ radio, label }) => [radio, label])),
      h("div", { class: "grow" }, made.element), again));
  return {
    ...made,
    element,
    again,
    get: () => (random.checked ? -1 : control.value.trim() || "0"),
    set: (value) => {
      const isRandom = value == null || String(value) === "-1";
      random.checked = isRandom;
      fixed.checked = !isRandom;
      if (!isRandom) control.value = String(value);
      show();
    },
  };
}

function cache() {
  const kind = choice("Step cache", Object.keys(CACHES), (name) => CACHES[name]);
  const threshold = number("Threshold", { min: 0, step: 0.05, placeholder: "Usual" });
  const element = h("div", { class: "pair" }, kind.element, threshold.element);
  const show = () => { threshold.control.disabled = !kind.control.value; };
  kind.control.addEventListener("change", show);
  show();
  return {
    element,
    control: kind.control,
    setError: kind.setError,
    get: () => (kind.control.value ? kind.control.value + (threshold.get() == null ? "" : `:${threshold.get()}`) : null),
    set: (value) => {
      const [name, amount] = String(value ?? "").split(":");
      kind.set(name);
      threshold.set(amount ?? "");
      show();
    },
  };
}

function size(models, fields) {
  const { width, height } = fields;
  const sizes = (models.sizes ?? []).map(([w, tall]) => `${w}x${tall}`);
  const preset = choice("Size", [...sizes, ""], (name) => (name ? `${name.replace("x", " × ")}${ratio(...name.split("x").map(Number))}` : "Custom"));
  const follow = () => {
    const now = `${width.control.value}x${height.control.value}`;
    preset.control.value = sizes.includes(now) ? now : "";
  };
  const changed = () => { follow(); preset.control.dispatchEvent(new Event("input", { bubbles: true })); };
  preset.control.addEventListener("change", () => {
    const [w, tall] = preset.control.value.split("x");
    if (tall) { width.set(w); height.set(tall); changed(); }
  });
  for (const side of [width, height]) side.control.addEventListener("input", follow);
  const swap = button("Swap width and height", "swap", () => {
    const before = width.control.value;
    width.set(height.control.value);
    height.set(before);
    changed();
  });
  const element = h("div", { class: "size" }, preset.element, width.element, height.element, swap);
  return { element, follow };
}

/** The options of the chosen sampler: models.sampler_options is {sampler: {name: {kind, default, low, high, choices}}}. */
function samplerOptions(models) {
  const element = h("div", { class: "grid" });
  let shown = {};
  const known = {};
  const described = (name) => models.sampler_options?.[name] ?? {};
  const made = (name, option) => {
    const label = sentence(name);
    if (option.choices?.length) return choice(label, option.choices);
    if (typeof option.default === "boolean") return flag(label);
    return number(label, { min: option.low, max: option.high, step: option.kind === "int" ? 1 : "any", placeholder: option.default ?? "" });
  };
  const read = () => {
    const found = {};
    for (const [name, { setting, option }] of Object.entries(shown)) {
      const value = setting.get();
      if (value != null && value !== "" && !equal(value, option.default)) found[name] = value;
    }
    return found;
  };
  return {
    element,
    control: element,
    setError: () => {},
    get: read,
    set: (values) => {
      for (const [name, { setting, option }] of Object.entries(shown)) {
        const isNumber = setting.control.type === "number";
        setting.set(values?.[name] ?? (isNumber ? "" : option.default));
      }
      Object.assign(known, values);
    },
    show(sampler) {
      Object.assign(known, read());
      const options = described(sampler);
      shown = Object.fromEntries(Object.entries(options).map(([name, option]) => [name, { option, setting: made(name, option) }]));
      element.replaceChildren(...Object.values(shown).map(({ setting }) => setting.element));
      if (!Object.keys(shown).length) element.append(h("p", { class: "hint" }, "This sampler has no options."));
      this.set({ ...known });
    },
    find: (name) => shown[name]?.setting,
  };
}

function section(title, note, ...children) {
  const shown = h("span", { class: "note" });
  const element = h("details", { class: "section" }, h("summary", {}, h("h2", {}, title), shown), h("div", { class: "stack" }, children));
  return { element, note: shown, update: () => { shown.textContent = note(); } };
}

/**
 * Make the form. `start` and `control` are the elements of start image and control pictures, each {element, note()}.
 * Returns {element, problem, batch, read(), write(settings), check(), showError(text), clearErrors(), refresh(), setSize(w, h), loras}.
 */
export function createForm(models, { start, control, onchange, onReuse }) {
  const names = (rows) => rows.map((row) => row.name ?? row);
  const text = (label, rows, hint) => new Setting(label, h("textarea", { rows, spellcheck: "true", autocapitalize: "off" }), { hint });
  const most = models.limits ?? {};
  const side = (label) => number(label, { min: 16, max: most.max_size, step: 8 });
  const main = {
    prompt: text("Prompt", 5),
    negative_prompt: text("Negative prompt", 2),
    width: side("Width"),
    height: side("Height"),
    sampler: choice("Sampler", names(models.samplers)),
    schedule: choice("Schedule", names(models.schedules)),
    steps: number("Steps", { min: 1, max: most.max_steps, step: 1 }),
    guidance_scale: number("CFG scale", { min: 0, step: 0.5 }),
    shift: number("Shift", { min: 0, step: 0.5 }),
    seed: seed(onReuse),
    batch_size: number("Pictures", { min: 1, max: most.max_batch, step: 1 }),
  };
  const guidance = {
    guidance_interval: interval("Guidance acts"),
    rescale_cfg: number("RescaleCFG", { min: 0, max: 1, step: 0.1 }),
    cfg_norm: number("CFGNorm", { min: 0, max: 100, step: 0.1 }),
    cfg_zero_star: flag("CFG-Zero*"),
    apg: flag("Adaptive projected guidance (APG)"),
  };
  const apg = {
    apg_eta: number("APG eta", { min: -10, max: 10, step: 0.1 }),
    apg_norm_threshold: number("APG norm threshold", { min: 0, max: 50, step: 0.5 }),
    apg_momentum: number("APG momentum", { min: -5, max: 1, step: 0.1 }),
  };
  const options = samplerOptions(models);
  const levels = {
    start_at_step: number("Start at step", { min: 0, step: 1 }),
    end_at_step: number("End at step", { min: 0, step: 1, placeholder: "Last" }),
    sigmas: numbers("Noise levels", "From 1 (noise) to 0 (picture), instead of steps and schedule"),
    noise: choice("Noise of the steps", NOISE),
    add_noise: flag("Add noise at the start"),
    return_with_leftover_noise: flag("Keep leftover noise"),
  };
  const speed = { cache: cache(), cache_interval: interval("Cache acts"), tile: number("VAE tile", { min: 0, step: 8, placeholder: "As needed" }) };
  const more = { ...guidance, ...apg, ...levels, ...speed, sampler_options: options };
  const settings = { ...main, ...more };
  const loras = loraList(models.loras ?? [], {
    onchange: () => changed(),
    onTrigger: (words) => {
      const prompt = main.prompt.control;
      if (!prompt.value.includes(words)) prompt.value = prompt.value.trim() ? `${prompt.value.trim()}, ${words}` : words;
      changed();
    },
  });
  let others = {};
  const otherList = h("ul", { class: "others" });

  const shape = size(models, main);
  const apgGroup = h("div", { class: "grid" }, Object.values(apg).map(({ element }) => element));
  const pick = (...rows) => rows.map((row) => row.element);
  const changedMore = () => Object.keys(advanced()).length;
  const sections = [
    section("LoRAs", () => loras.note(), loras.element),
    section("Start image", () => start.note(), start.element),
    ...(models.controls?.length ? [section("Control", () => control.note(), control.element)] : []),
    section("Advanced", () => (changedMore() ? `${changedMore()} changed` : ""),
      h("h3", {}, "Guidance"),
      h("div", { class: "grid" }, pick(guidance.guidance_interval, guidance.rescale_cfg, guidance.cfg_norm)),
      h("div", {}, pick(guidance.cfg_zero_star, guidance.apg)), apgGroup,
      h("h3", {}, "Sampler options"), options.element,
      h("h3", {}, "Noise and steps"),
      h("div", { class: "grid" }, pick(levels.noise, levels.start_at_step, levels.end_at_step)), levels.sigmas.element,
      h("div", {}, pick(levels.add_noise, levels.return_with_leftover_noise)),
      h("h3", {}, "Speed and memory"), speed.cache.element,
      h("div", { class: "pair" }, pick(speed.cache_interval, speed.tile)),
      otherList,
      h("p", {}, h("button", { type: "button", onclick: () => { write({ ...models.defaults, ...basics(), loras: loras.get() }); changed(); } }, "Reset advanced settings"))),
  ];
  const problem = h("p", { class: "error problem", hidden: true });
  const element = h("div", { class: "form" },
    h("section", { class: "card stack", "aria-label": "Prompt and size" },
      main.prompt.element, main.negative_prompt.element, shape.element,
      h("div", { class: "thirds" }, pick(main.steps, main.guidance_scale, main.shift)),
      h("div", { class: "pair" }, pick(main.sampler, main.schedule)), main.seed.element),
    h("section", { class: "card sections", "aria-label": "More settings" }, sections.map((part) => part.element)));

  function basics() {
    return Object.fromEntries(Object.entries(main).map(([name, setting]) => [name, setting.get()]));
  }

  function advanced() {
    const found = {};
    for (const [name, setting] of Object.entries(more)) {
      if (name in apg && !guidance.apg.get()) continue;
      if (name === "cache_interval" && !speed.cache.get()) continue;
      const value = setting.get();
      const usual = models.defaults?.[name];
      const isUnset = value == null && (setting.control.type === "number" || name === "guidance_interval");
      if (!isUnset && !equal(value, usual) && !(equal(value, []) && usual == null) && !(equal(value, {}) && usual == null)) found[name] = value;
    }
    return found;
  }

  /** Return the settings as the API's flat object, without pictures. */
  function read() {
    return { ...basics(), ...advanced(), ...others, ...(loras.get().length ? { loras: loras.get() } : {}) };
  }

  /** Show these settings; names that are missing keep their value. */
  function write(values) {
    for (const [name, setting] of Object.entries(settings)) {
      if (name === "sampler_options") continue;
      if (name in values) setting.set(values[name]);
    }
    options.show(main.sampler.get());
    if ("sampler_options" in values) options.set(values.sampler_options);
    if ("loras" in values) loras.set(values.loras ?? []);
    const ours = new Set([...Object.keys(settings), "loras", "image", "mask", "controls", "denoise", "paste", "batch_index", "preview_every"]);
    others = Object.fromEntries(Object.entries(values).filter(([name, value]) =>
      !ours.has(name) && value != null && !equal(value, models.defaults?.[name]) && !(Array.isArray(value) && !value.length)));
    shape.follow();
    show();
  }

  function show() {
    apgGroup.hidden = !guidance.apg.get();
    otherList.replaceChildren(...Object.keys(others).map((name) => h("li", { class: "row" },
      h("span", { class: "grow" }, `Also set: ${sentence(name).toLowerCase()}`),
      button(`Remove ${name}`, "close", () => { delete others[name]; changed(); }))));
    for (const part of sections) part.update();
  }

  function changed() {
    show();
    onchange(read());
  }

  /** Show which numbers cannot be read, and return whether all can. */
  function check() {
    const bad = Object.values(settings).find((setting) => setting.control.validity?.badInput);
    bad?.setError("Expected a number");
    bad?.control.focus();
    return !bad;
  }

  function clearErrors() {
    for (const setting of Object.values(settings)) setting.setError("");
    problem.hidden = true;
  }

  /** Show an error of the server at the setting that it names, or else in a line above the button. */
  function showError(message) {
    const named = message.match(/[A-Za-z_]+/g) ?? [];
    const find = (name) => settings[name] ?? options.find(name);
    const name = named.find((word) => find(word));
    const setting = name && name !== "sampler_options" ? find(name) : null;
    if (!setting) {
      problem.textContent = message[0].toUpperCase() + message.slice(1);
      problem.hidden = false;
      return;
    }
    setting.setError(sentence(message));
    for (let parent = setting.element.parentElement; parent; parent = parent.parentElement) if (parent.tagName === "DETAILS") parent.open = true;
    setting.control.focus();
  }

  main.sampler.control.addEventListener("change", () => { options.show(main.sampler.get()); changed(); });
  element.addEventListener("input", (event) => {
    const setting = Object.values(settings).find((one) => one.control === event.target);
    setting?.setError("");
    problem.hidden = true;
    changed();
  });
  element.addEventListener("change", () => changed());
  return { element, problem, batch: main.batch_size, read, write, check, showError, clearErrors, refresh: show, setSize: (w, tall) => write({ width: w, height: tall }), loras };
}
