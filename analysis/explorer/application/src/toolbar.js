// The tools above the plots: gestures, ways to combine, count, undo; and the named selections with their algebra.

import { countText, element } from "./dom.js";
import { MODES, Selection } from "./selection.js";

const TOOLS = { lasso: "Lasso", rectangle: "Rectangle", pan: "Pan" };

/** A row of buttons of which one is pressed. */
function choice(label, options, onChoose) {
  const buttons = Object.entries(options).map(([key, text]) =>
    element("button", { type: "button", "data-key": key, onclick: () => onChoose(key) }, text),
  );
  return {
    node: element("div", { class: "group", role: "group", "aria-label": label }, ...buttons),
    press: (key) => buttons.forEach((button) => button.setAttribute("aria-pressed", String(button.dataset.key === key))),
  };
}

export class Toolbar {
  /** @param on {tool(key), mode(key), clear(), all(), invert(), undo(), reset()} */
  constructor(root, on) {
    this.tools = choice("Gesture", TOOLS, on.tool);
    this.modes = choice("Combine with the selection", MODES, on.mode);
    this.count = element("p", { id: "count", role: "status", "aria-live": "polite" });
    const button = (text, action, title) => element("button", { type: "button", onclick: action, title }, text);
    this.undo = button("Undo", on.undo, "Undo the last change of the selection (Ctrl+Z)");
    root.replaceChildren(
      this.count,
      this.tools.node,
      this.modes.node,
      element(
        "div",
        { class: "group", role: "group", "aria-label": "Selection" },
        button("All", on.all, "Select every sample"),
        button("None", on.clear, "Clear the selection (Escape)"),
        button("Invert", on.invert, "Select the others"),
        this.undo,
      ),
      button("Reset view", on.reset, "Show every point (double click)"),
    );
  }

  show({ tool, mode, selection, canUndo }) {
    this.tools.press(tool);
    this.modes.press(mode);
    this.undo.disabled = !canUndo;
    const text = `${countText(selection.count)} of ${countText(selection.mask.length)} selected`;
    if (this.count.textContent !== text) this.count.textContent = text;
  }
}

export class NamedSelections {
  /** @param on {save(name), use(name, mode), drop(name)} */
  constructor(root, on) {
    this.on = on;
    this.name = element("input", { type: "text", "aria-label": "Name of the selection", placeholder: "name", maxlength: 60 });
    this.list = element("ul", {});
    root.replaceChildren(
      element(
        "form",
        {
          onsubmit: (event) => {
            event.preventDefault();
            if (this.name.value.trim()) on.save(this.name.value.trim());
            this.name.value = "";
          },
        },
        this.name,
        element("button", { type: "submit" }, "Keep the selection"),
      ),
      this.list,
    );
  }

  show(named) {
    const button = (text, action, label) => element("button", { type: "button", onclick: action, "aria-label": label }, text);
    this.list.replaceChildren(
      ...Array.from(named, ([name, selection]) =>
        element(
          "li",
          {},
          element("strong", {}, name),
          element("small", {}, countText(selection.count)),
          ...Object.entries(MODES).map(([mode, text]) => button(text, () => this.on.use(name, mode), `${text}: ${name}`)),
          button("Delete", () => this.on.drop(name), `Delete ${name}`),
        ),
      ),
    );
  }
}

export const everySample = (size) => new Selection(new Uint8Array(size).fill(1), [{ tool: "all" }]);
