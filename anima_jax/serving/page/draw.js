/** The Draw tab. */

import { h } from "./ui.js";

/** Fill `element` with the tab. */
export function mount(element) {
  element.append(h("p", {}, "Draw"));
}
