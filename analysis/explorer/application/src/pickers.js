// The pickers of run, colour, axes, order, ranges and comparison: what the study has to choose from, and what is chosen.

import { element, fillOptions, picker } from "./dom.js";

const by = (id) => document.getElementById(id);

export class Pickers {
  /** @param on {run(id), colour(name), axis(k, end, name), scale(k, end, isLog), sort(parts), compare(change)} */
  constructor(on) {
    this.on = on;
  }

  /** Offer the runs and columns of a node. @param ranges the filters, whose columns are picked too */
  fill(node, state, ranges) {
    const runs = node.manifest.runs.map((run) => [run.id, runText(run)]);
    const columns = columnOptions(node, state.run);
    const run = picker("Run", runs, state.run, this.on.run);
    const colour = picker("Colour", { class: [["class", "class"]], ...columns }, state.colour, this.on.colour);
    by("pickers").querySelector(".of-node")?.remove();
    by("pickers").append(element("div", { class: "of-node" }, run.node, " ", colour.node));
    state.plots.forEach((plot, k) => {
      const axis = (end) => [
        picker(end, columns, plot[end], (name) => this.on.axis(k, end, name)).node,
        this.scaleBox(node.column(state.run, plot[end]), plot, k, end),
      ];
      by(`axes-${k}`).replaceChildren(...[...axis("x"), ...axis("y")].filter(Boolean));
    });
    this.fillOrder(columns, state.sort);
    ranges.forEach((range, k) => fillOptions(range.picker.select, columns, state.ranges[k]));
    const { column, runs: compared } = state.compare;
    const compare = (label, options, value, set) => picker(label, options, value, (chosen) => this.on.compare((next) => set(next, chosen))).node;
    by("compare-pickers").replaceChildren(
      compare("Rank by", columns, column, (next, name) => (next.column = name)),
      compare("Run A", runs, compared[0], (next, id) => (next.runs = [id, next.runs[1]])),
      compare("Run B", runs, compared[1], (next, id) => (next.runs = [next.runs[0], id])),
    );
  }

  fillOrder(columns, sort) {
    const name = picker("Sorted by", columns, sort.name, (chosen) => this.on.sort({ name: chosen }));
    const ends = [["down", "largest first"], ["up", "smallest first"]];
    const direction = picker("", ends, "", (value) => this.on.sort({ descending: value === "down" }));
    direction.select.setAttribute("aria-label", "Order");
    this.order = [name.select, direction.select];
    by("sorting").replaceChildren(name.node, direction.node);
    this.showOrder(sort);
  }

  /** Show the order that is chosen elsewhere, in the table. */
  showOrder({ name, descending }) {
    this.order[0].value = name;
    this.order[1].value = descending ? "down" : "up";
  }

  scaleBox(column, plot, k, end) {
    if (column.scale !== "log") return null;
    const box = element("input", {
      type: "checkbox",
      checked: !plot.linear.includes(end),
      onchange: () => this.on.scale(k, end, box.checked),
    });
    return element("label", { class: "check" }, box, "log");
  }
}

function columnOptions(node, runId) {
  const options = {};
  for (const column of node.columns(runId)) {
    options[column.group] = [...(options[column.group] ?? []), [column.name, column.label]];
  }
  return options;
}

function runText({ id, status, diverged_epoch: epoch }) {
  return status === "diverged" ? `${id} (diverged in epoch ${epoch})` : id;
}
