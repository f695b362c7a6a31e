/** The LoRAs of a drawing: a list with weights, and a dialog to pick them from the server's library. */

import { button, dialog, h, newId } from "./ui.js";

/** Return {element, get(), set(rows), note(), update(library)}; rows are {name, weight}. */
export function loraList(library, { onchange, onTrigger }) {
  let rows = [];
  const list = h("ul", { class: "loras" });
  const add = button("Add LoRA", "plus", () => pick(), { kind: "", text: true });
  const element = h("div", { class: "stack" }, list, h("p", {}, add));
  const find = (name) => library.find((lora) => (lora.name ?? lora) === name);
  const triggers = (name) => {
    const found = find(name)?.triggers ?? find(name)?.trigger ?? [];
    return (Array.isArray(found) ? found : [found]).filter(Boolean);
  };

  function row(lora, index) {
    const weight = h("input", {
      type: "number", step: 0.05, min: -10, max: 10, id: newId("weight"), value: Array.isArray(lora.weight) ? lora.weight[0] : lora.weight,
      oninput: (event) => { lora.weight = event.target.value === "" ? 1 : Number(event.target.value); onchange(); event.stopPropagation(); },
    });
    return h("li", { class: "lora" },
      h("div", { class: "row" },
        h("label", { for: weight.id, class: "grow name" }, lora.name, h("span", { class: "unseen" }, " weight")),
        weight, button(`Remove ${lora.name}`, "close", () => { rows.splice(index, 1); render(); onchange(); add.focus(); })),
      find(lora.name) ? null : h("p", { class: "error" }, "Not in this server's folder."),
      triggers(lora.name).length ? h("p", { class: "row wrap" }, triggers(lora.name).slice(0, 8).map((words) =>
        h("button", { type: "button", class: "chip", title: "Add to the prompt", onclick: () => onTrigger(words) }, words))) : null);
  }

  function render() {
    list.replaceChildren(...rows.map(row));
    add.disabled = !library.length;
    if (!library.length && !rows.length) list.append(h("li", { class: "hint" }, "The server has no LoRAs. Start it with --lora_dir and their folder."));
  }

  async function pick() {
    const search = h("input", { type: "search", "aria-label": "Search LoRAs", placeholder: "Search name or trigger", autocomplete: "off" });
    const found = h("ul", { class: "picker" });
    const count = h("p", { class: "hint", role: "status" });
    const opened = dialog("Add a LoRA", h("div", { class: "stack" }, search, count, found), [], { kind: "small" });
    const show = () => {
      const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
      const rest = library.filter((lora) => {
        const text = `${lora.name ?? lora} ${triggers(lora.name ?? lora).join(" ")}`.toLowerCase();
        return words.every((word) => text.includes(word));
      });
      count.textContent = `${rest.length} of ${library.length}`;
      found.replaceChildren(...rest.slice(0, 200).map((lora) => {
        const name = lora.name ?? lora;
        return h("li", {}, h("button", { type: "button", class: "quiet", disabled: rows.some((one) => one.name === name), onclick: () => opened.close(name) },
          h("span", { class: "name" }, name), h("span", { class: "hint" }, triggers(name).join(", "))));
      }));
    };
    search.addEventListener("input", show);
    search.addEventListener("keydown", (event) => {
      if (event.key !== "Enter") return;
      event.preventDefault(); // or it would press the button that has the focus once the dialog is closed
      found.querySelector("button:not(:disabled)")?.click();
    });
    show();
    search.focus();
    const name = await opened.closed;
    if (name == null) return;
    rows.push({ name, weight: 1 });
    render();
    onchange();
    list.lastChild.querySelector("input").select();
  }

  render();
  return {
    element,
    get: () => rows.map((row) => ({ ...row })),
    set: (values) => { rows = values.map(({ name, weight = 1 }) => ({ name, weight })); render(); },
    note: () => (rows.length ? rows.map(({ name }) => name).join(", ") : ""),
    update: (found) => { library = found; render(); },
  };
}
