/** The Data tab: the pictures of a data set as they will be trained, and their captions to edit. */

import { captionEditor, cropped } from "./caption.js";
import { button, confirm, dialog, field, h, picture, select, showError, stored, toast } from "./ui.js";

const PAGE = 60;
const READING_MS = 1000;
const QUIET_MS = 10000;
const WIDE = matchMedia("(min-width: 1000px)");

const FILTERS = {
  all: "All pictures", trained: "Trained", left_out: "Left out", no_caption: "Without a caption", upscaled: "Smaller than their bucket",
  cropped: "More than half cropped", long: "Caption too long",
};
const KINDS = { training: "training configuration", dataset: "data set", folder: "folder, shown at 1024 pixels with buckets of ratios 0.5 to 2" };

const plural = (count, noun) => `${count.toLocaleString("en")} ${noun}${count === 1 ? "" : "s"}`;

/** Fill `element` with the tab. */
export async function mount(element, api) {
  let summary = null;
  let version = null;
  let pictures = [];
  let total = 0;
  let timer = 0;
  let asked = 0;
  const wanted = { search: "", filter: "", bucket: "", tag: "", source: null };

  // ---- the data set -----------------------------------------------------------------------------------------------
  const about = h("div", { class: "grow" });
  const state = h("p", { class: "badge", role: "status" });
  const undo = button("Undo", "undo", () => takeBack(), { text: true, hidden: true });
  const facts = h("dl", { class: "runfacts" });
  const trouble = h("p", { class: "error", role: "alert", hidden: true });
  const header = h("section", { class: "card", "aria-label": "The data set" },
    h("div", { class: "row wrap" }, about, state, undo, button("Read the files again", "again", () => again())), trouble, facts);

  // ---- filters ----------------------------------------------------------------------------------------------------
  const search = h("input", { type: "search", autocomplete: "off", placeholder: "Name or caption", oninput: () => later(() => ask({ search: search.value })) });
  const filter = h("select", { onchange: () => ask({ filter: filter.value }) });
  const bucket = h("select", { onchange: () => ask({ bucket: bucket.value }) });
  const source = h("select", { onchange: () => ask({ source: source.value === "" ? null : Number(source.value) }) });
  const crops = h("input", { type: "checkbox", id: "show-crops", checked: stored.get("crops", true), onchange: () => { stored.set("crops", crops.checked); drawGrid(); } });
  const chosenTag = h("p", { class: "chosentag" });
  const sourceField = field("Folder", source);
  const count = h("p", { class: "hint", role: "status" });
  const grid = h("ul", { class: "datagrid" });
  const more = h("button", { type: "button", class: "more", onclick: () => loadMore() }, "Show more");
  const gallery = h("section", { class: "card", "aria-label": "Pictures" },
    h("div", { class: "filters" }, field("Search", search).element, field("Show", filter).element, field("Bucket", bucket).element, sourceField.element,
      h("label", { class: "check", for: "show-crops" }, crops, "Crops")), chosenTag, count, grid, more);

  // ---- the editor -------------------------------------------------------------------------------------------------
  const editor = captionEditor(api, { onSaved: saved, onMove: move, tags: () => tagCounts });
  const place = h("section", { class: "card editorplace", "aria-label": "Caption", hidden: true });
  let opened = null;

  // ---- what is known of it ----------------------------------------------------------------------------------------
  let tagCounts = [];
  const buckets = h("div", {});
  const tagSearch = h("input", { type: "search", autocomplete: "off", placeholder: "Search tags", "aria-label": "Search tags", oninput: () => drawTags() });
  const tagList = h("ul", { class: "tagcloud" });
  const tagHint = h("p", { class: "hint" });
  const leftOut = h("div", { class: "stack" });
  const alike = h("div", { class: "stack" });
  const part = (title, ...children) => h("details", { class: "card part" }, h("summary", {}, title), h("div", { class: "stack" }, children));
  const bucketPart = part("Buckets and steps", buckets);
  const tagPart = part("Tags", bulkForm(), tagSearch, tagHint, tagList);
  const leftOutPart = part("Left out", leftOut);
  const alikePart = part("Look alike", alike);
  alikePart.addEventListener("toggle", () => { if (alikePart.open) findAlike(); });
  const side = h("div", { class: "stack side" }, place, bucketPart, tagPart, leftOutPart, alikePart);
  element.replaceChildren(h("div", { class: "runpage" }, header, h("div", { class: "dataparts" }, gallery, side)));

  let waiting = 0;
  function later(run) {
    clearTimeout(waiting);
    waiting = setTimeout(run, 250);
  }

  // ---- asking the server --------------------------------------------------------------------------------------------

  const parameters = () => Object.fromEntries(Object.entries(wanted).filter(([, value]) => value !== "" && value != null));

  async function ask(changed = {}) {
    Object.assign(wanted, changed);
    const mine = ++asked;
    try {
      const answer = await api.get("api/dataset/pictures", { ...parameters(), limit: Math.max(PAGE, Object.keys(changed).length ? 0 : Math.min(500, pictures.length)) });
      if (mine !== asked) return;
      ({ pictures, total } = answer);
      drawGrid();
    } catch (error) {
      showError(error);
    }
  }

  async function loadMore() {
    const mine = asked;
    const answer = await api.get("api/dataset/pictures", { ...parameters(), offset: pictures.length, limit: PAGE }).catch(showError);
    if (!answer || mine !== asked) return;
    const first = pictures.length;
    pictures = [...pictures, ...answer.pictures];
    total = answer.total;
    drawGrid();
    grid.children[first]?.querySelector("button")?.focus();
  }

  async function refresh() {
    clearTimeout(timer);
    try {
      summary = await api.get("api/dataset");
      drawHeader();
      if (version !== summary.version) {
        version = summary.version;
        drawParts();
        await Promise.all([ask(), loadTags()]);
      }
    } catch (error) {
      if (version === null) throw error;
    } finally {
      timer = setTimeout(tick, summary?.state === "reading" ? READING_MS : QUIET_MS);
    }
  }

  function tick() {
    if (element.hidden || document.hidden) timer = setTimeout(tick, READING_MS);
    else refresh().catch(() => {});
  }

  async function again() {
    await api.post("api/dataset/reload").catch(showError);
    await refresh();
  }

  async function takeBack() {
    try {
      await editor.leave();
      const { what, refused } = await api.post("api/dataset/undo");
      toast(refused.length ? `Could not undo all of it: ${refused[0]}` : `Undone: ${what}`, { kind: refused.length ? "error" : "info" });
      await refresh();
      if (editor.id) await editor.show(editor.id);
    } catch (error) {
      showError(error);
    }
  }

  async function loadTags() {
    tagCounts = (await api.get("api/dataset/tags", { limit: 2000 })).tags;
    drawTags();
    editor.suggest();
  }

  // ---- drawing ------------------------------------------------------------------------------------------------------

  function drawHeader() {
    about.replaceChildren(h("h2", {}, summary.path), h("p", { class: "hint" }, `A ${KINDS[summary.kind]}`));
    const reading = { reading: `Reading… ${summary.read.toLocaleString("en")} files`, ready: "", failed: "Cannot be read" }[summary.state];
    if (state.textContent !== reading) state.textContent = reading;
    state.hidden = !reading;
    trouble.textContent = summary.error;
    trouble.hidden = !summary.error;
    undo.hidden = !summary.undo;
    undo.title = summary.undo ? `Undo ${summary.undo}` : "";
    const rows = { Pictures: summary.counts.all, Trained: summary.counts.trained, "Left out": summary.counts.left_out, "Examples per epoch": summary.tiers.reduce((sum, tier) => sum + tier.examples, 0),
      "Steps in the first epoch": summary.steps_of_first_epoch, ...(summary.kind === "training" ? { "Steps in all": summary.steps } : {}) };
    facts.replaceChildren(...Object.entries(rows).map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", { class: "number" }, value.toLocaleString("en")))));
  }

  function options(control, rows, value) {
    const key = JSON.stringify(rows);
    if (control.dataset.rows !== key) {
      control.dataset.rows = key;
      control.replaceChildren(...rows.map(([name, text]) => h("option", { value: name }, text)));
    }
    control.value = value ?? "";
  }

  function drawParts() {
    options(filter, Object.entries(FILTERS).map(([name, text]) => [name === "all" ? "" : name, `${text} (${summary.counts[name].toLocaleString("en")})`]), wanted.filter);
    const groups = [...new Set(summary.buckets.map((one) => one.name))];
    options(bucket, [["", "All"], ...groups.map((name) => [name, name])], wanted.bucket);
    options(source, [["", "All"], ...summary.sources.map((one, index) => [String(index), one.name.split("/").slice(-2).join("/")])], wanted.source);
    sourceField.element.hidden = summary.sources.length < 2;
    const without = summary.kind === "training" ? null : h("p", { class: "hint" }, "Steps are counted one picture each: the batch size is in a training configuration.");
    buckets.replaceChildren(
      without ?? "",
      h("div", { class: "table fixed", tabindex: 0, role: "region", "aria-label": "Tiers" }, h("table", {},
        h("thead", {}, h("tr", {}, ["Resolution", "Examples", "Tokens", "Padding", "Batch", "Steps per epoch"].map((name, index) => h("th", { scope: "col", class: index ? "number" : null }, name)))),
        h("tbody", {}, summary.tiers.map((tier) => h("tr", {}, h("th", { scope: "row" }, tier.name),
          [tier.examples, tier.tokens, `${(100 * tier.padding).toFixed(1)} %`, tier.batch, tier.steps_per_epoch.toFixed(1)].map((value) => h("td", { class: "number" }, value.toLocaleString("en")))))))),
      h("div", { class: "table fixed", tabindex: 0, role: "region", "aria-label": "Buckets" }, h("table", {},
        h("thead", {}, h("tr", {}, ["Bucket", "Resolution", "Pictures", "Examples"].map((name, index) => h("th", { scope: "col", class: index ? "number" : null }, name)))),
        h("tbody", {}, summary.buckets.map((one) => h("tr", {},
          h("th", { scope: "row" }, h("button", { type: "button", class: "link", onclick: () => { bucket.value = one.name; ask({ bucket: one.name }); } }, one.name)),
          [one.resolution ?? "own size", one.pictures, one.examples].map((value) => h("td", { class: "number" }, value.toLocaleString("en")))))))),
      h("ul", { class: "stack" }, summary.sources.map((one) => h("li", { class: "hint" }, `${one.line}${one.num_repeats === 1 ? "" : `; repeated ${one.num_repeats} times`}`))),
      summary.messages.length ? h("ul", { class: "stack" }, summary.messages.map((line) => h("li", { class: "hint" }, line))) : "");
    leftOutPart.querySelector("summary").textContent = `Left out (${summary.counts.left_out.toLocaleString("en")})`;
    drawLeftOut().catch(showError);
  }

  async function drawLeftOut() {
    if (!summary.counts.left_out && !summary.problems.length) {
      leftOut.replaceChildren(h("p", { class: "hint" }, "Nothing is left out."));
      return;
    }
    const { pictures: found, total: all } = await api.get("api/dataset/pictures", { filter: "left_out", limit: 500 });
    const reasons = new Map();
    for (const one of found) reasons.set(one.left_out, [...(reasons.get(one.left_out) ?? []), one]);
    const known = new Set(found.map((one) => one.left_out));
    const others = summary.problems.filter((line) => ![...known].some((reason) => line.endsWith(reason)));
    leftOut.replaceChildren(
      ...[...reasons].map(([reason, list]) => h("div", {}, h("h3", {}, `${plural(list.length, "picture")}: ${reason}`),
        h("ul", { class: "names" }, list.slice(0, 50).map((one) => h("li", {}, h("button", { type: "button", class: "link", onclick: () => open(one.id) }, one.name)))),
        list.length > 50 ? h("p", { class: "hint" }, `and ${list.length - 50} more`) : null)),
      all > found.length ? h("p", { class: "hint" }, `The first ${found.length} of ${all}.`) : "",
      others.length ? h("ul", { class: "stack" }, others.slice(0, 50).map((line) => h("li", { class: "hint" }, line))) : "");
  }

  function tile(one) {
    const badges = [
      one.left_out ? h("span", { class: "badge bad" }, "left out") : null,
      one.upscaled ? h("span", { class: "badge warn" }, "enlarged") : null,
      one.tokens > summary.token_limit ? h("span", { class: "badge warn" }, "too long") : null,
      one.frames > 1 ? h("span", { class: "badge" }, plural(one.frames, "frame")) : null,
    ];
    const size = one.buckets.length ? one.buckets[0].bucket : one.width ? `${one.width}×${one.height}` : "";
    return h("li", {}, h("button", { type: "button", class: "tilebutton", dataset: { id: one.id }, "aria-pressed": String(one.id === editor.id), onclick: () => open(one.id) },
      h("span", { class: "tileimage" }, cropped(api, one, crops.checked ? one.buckets[0] : null, 256, "")),
      h("span", { class: "tilename" }, one.name), h("span", { class: "tilecaption hint" }, one.caption || "No caption"),
      h("span", { class: "tilebadges" }, size ? h("span", { class: "badge" }, size) : null, badges)));
  }

  function drawGrid() {
    const focused = document.activeElement?.dataset?.id;
    grid.replaceChildren(...pictures.map(tile));
    if (focused) grid.querySelector(`[data-id="${focused}"]`)?.focus();
    const text = summary?.state === "reading" && !total ? "Reading…" : `${plural(total, "picture")}${total > pictures.length ? `, the first ${pictures.length} shown` : ""}`;
    if (count.textContent !== text) count.textContent = text;
    more.hidden = pictures.length >= total;
    chosenTag.replaceChildren(...(wanted.tag ? ["With the tag ", h("button", { type: "button", class: "chip", "aria-label": `No longer only ${wanted.tag}`, onclick: () => { ask({ tag: "" }).then(drawTags); } }, `${wanted.tag} ×`)] : []));
  }

  function drawTags() {
    const words = tagSearch.value.trim().toLowerCase();
    const found = tagCounts.filter(({ tag }) => tag.toLowerCase().includes(words));
    tagPart.querySelector("summary").textContent = `Tags (${tagCounts.length.toLocaleString("en")}${tagCounts.length === 2000 ? " and more" : ""})`;
    tagHint.textContent = found.length > 200 ? `The 200 most frequent of ${found.length}` : "";
    tagList.replaceChildren(...found.slice(0, 200).map(({ tag, count: number }) => h("li", {},
      h("button", { type: "button", class: "chip", "aria-pressed": String(wanted.tag === tag), onclick: () => { ask({ tag: wanted.tag === tag ? "" : tag }).then(drawTags); } },
        tag, h("span", { class: "hint number" }, ` ${number.toLocaleString("en")}`)))));
  }

  // ---- editing ------------------------------------------------------------------------------------------------------

  async function open(id) {
    if (!(await editor.leave())) return;
    await editor.show(id).catch(showError);
    for (const one of grid.querySelectorAll("[aria-pressed]")) one.setAttribute("aria-pressed", String(one.dataset.id === id));
    if (WIDE.matches) {
      place.hidden = false;
      if (editor.element.parentElement !== place) place.replaceChildren(editor.element);
      side.scrollTop = 0;
      editor.focus();
    } else if (!opened) {
      opened = dialog("Caption", editor.element);
      opened.closed.then(() => { opened = null; editor.leave(); });
      editor.focus();
    }
  }

  async function move(by) {
    const at = pictures.findIndex((one) => one.id === editor.id) + by;
    if (at >= pictures.length && pictures.length < total) await loadMore();
    if (pictures[at]) {
      await open(pictures[at].id);
      grid.querySelector(`[data-id="${pictures[at].id}"]`)?.scrollIntoView({ block: "nearest" });
    } else toast(by > 0 ? "This is the last picture" : "This is the first picture");
  }

  function saved(entry) {
    pictures = pictures.map((one) => (one.id === entry.id ? entry : one));
    drawGrid();
    refresh().catch(showError);
  }

  function bulkForm() {
    const action = select(["add", "remove", "rename"], "add", { onchange: () => { toField.element.hidden = action.value !== "rename"; } }, (name) => ({ add: "Add", remove: "Remove", rename: "Rename" })[name]);
    const tag = h("input", { autocomplete: "off", required: true });
    const to = h("input", { autocomplete: "off" });
    const toField = field("New name", to);
    const tagField = field("Tag", tag);
    toField.element.hidden = true;
    return h("form", {
      class: "bulk", "aria-label": "Change a tag in all pictures shown", onsubmit: async (event) => {
        event.preventDefault();
        const body = { action: action.value, tag: tag.value.trim(), to: action.value === "rename" ? to.value.trim() : "", search: wanted.search, filter: wanted.filter, bucket: wanted.bucket, with_tag: wanted.tag, source: wanted.source };
        try {
          if (!body.tag) return void tagField.setError("Which tag?");
          tagField.setError("");
          if (!(await editor.leave())) return;
          const { changes, first } = await api.post("api/dataset/tags", body);
          if (!changes) return void toast("No caption would change");
          const examples = first.map((one) => `${one.name}: ${one.after || "(empty)"}`).join("\n");
          if (!(await confirm(`Change ${plural(changes, "caption")}?`, h("span", { class: "before" }, examples), `Change ${plural(changes, "caption")}`, "primary"))) return;
          await api.post("api/dataset/tags", { ...body, expected: changes });
          toast(`${plural(changes, "caption")} changed`, { action: { label: "Undo", run: takeBack } });
          await refresh();
          if (editor.id) await editor.show(editor.id);
        } catch (error) {
          showError(error);
        }
      },
    }, field("In all pictures shown", action).element, tagField.element, toField.element, h("button", { type: "submit" }, "Count and change"));
  }

  async function findAlike() {
    const answer = await api.get("api/dataset/duplicates").catch((error) => { showError(error); return null; });
    if (!answer || !alikePart.open) return;
    if (answer.state === "searching") {
      alike.replaceChildren(h("p", { class: "hint", role: "status" }, `Compared ${answer.compared} of ${answer.total} pictures…`), h("progress", { max: answer.total || 1, value: answer.compared, "aria-label": "Pictures compared" }));
      setTimeout(findAlike, READING_MS);
      return;
    }
    alike.replaceChildren(h("p", { class: "hint" }, answer.groups.length ? `${plural(answer.groups.length, "group")} of pictures that look alike` : "No two pictures look alike."),
      ...answer.groups.slice(0, 100).map((group) => h("ul", { class: "alike" }, group.slice(0, 12).map((one) => h("li", {},
        h("button", { type: "button", class: "tilebutton", onclick: () => open(one.id) }, cropped(api, one, null, 128, ""), h("span", { class: "tilename" }, one.name)))))));
  }

  addEventListener("beforeunload", (event) => { if (editor.dirty) event.preventDefault(); });
  await refresh();
}
