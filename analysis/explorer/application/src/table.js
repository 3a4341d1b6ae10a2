// The selected samples as a table: pages of rows, sorted by any column, with a box that adds or removes a sample.

import { countText, element, valueText } from "./dom.js";
import { axisLabel } from "./axes.js";

const ROWS = 20;

export class SampleTable {
  /** @param on {sort(name), toggle(sample), pick(sample)} */
  constructor(root, on) {
    Object.assign(this, { root, on });
    this.page = 0;
  }

  /** @param order samples to show; @param columns [{name, label, unit}]; @param sort {name, descending} */
  show({ node, runId, order, columns, sort, selection }) {
    const isSame = this.data && this.data.order.length === order.length && this.data.sort.name === sort.name;
    if (!isSame) this.page = 0;
    this.data = { node, runId, order, columns, sort, selection };
    this.paint();
  }

  paint() {
    const { node, runId, order, columns, sort, selection } = this.data;
    const pages = Math.max(1, Math.ceil(order.length / ROWS));
    this.page = Math.min(this.page, pages - 1);
    const heading = (name, text) => {
      const direction = sort.name === name ? (sort.descending ? "descending" : "ascending") : "none";
      const arrow = { descending: " ↓", ascending: " ↑", none: "" }[direction];
      return element(
        "th",
        { scope: "col", "aria-sort": direction },
        element("button", { type: "button", onclick: () => this.on.sort(name) }, text + arrow),
      );
    };
    const plain = (text) => element("th", { scope: "col" }, text);
    const head = element(
      "tr",
      {},
      plain("selected"),
      plain("sample"),
      plain("class"),
      ...(node.names ? [plain("file")] : []),
      ...columns.map((column) => heading(column.name, axisLabel(column))),
    );
    const rows = Array.from(order.subarray(this.page * ROWS, (this.page + 1) * ROWS), (sample) => {
      const label = `sample ${node.id(sample)}`;
      return element(
        "tr",
        {},
        element(
          "td",
          {},
          element("input", {
            type: "checkbox",
            checked: Boolean(selection.mask[sample]),
            "aria-label": `${label} selected`,
            onchange: () => this.on.toggle(sample),
          }),
        ),
        element("td", {}, element("button", { type: "button", class: "link", onclick: () => this.on.pick(sample) }, String(node.id(sample)))),
        element("td", {}, node.className(sample)),
        ...(node.names ? [element("td", {}, node.name(sample))] : []),
        ...columns.map((column) => element("td", { class: "number" }, valueText(node.values(runId, column.name)[sample]))),
      );
    });
    const turn = (step, text) =>
      element(
        "button",
        { type: "button", disabled: this.page + step < 0 || this.page + step >= pages, onclick: () => this.turn(step) },
        text,
      );
    this.root.replaceChildren(
      element(
        "div",
        { class: "scroll", tabindex: 0, role: "region", "aria-label": "samples" },
        element("table", {}, element("thead", {}, head), element("tbody", {}, ...rows)),
      ),
      element("p", { class: "pages" }, turn(-1, "Previous"), ` ${countText(this.page + 1)} of ${countText(pages)} `, turn(1, "Next")),
    );
  }

  turn(step) {
    this.page += step;
    this.paint();
    this.root.querySelector(".scroll").focus();
  }
}
