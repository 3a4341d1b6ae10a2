// Filters of one column: a histogram to brush, sliders of quantiles, and numbers; and the chips of the classes.

import { axisLabel, axisTicks, extentOf, layOut, toValue } from "./axes.js";
import { classColour } from "./colours.js";
import { countText, element, picker, valueText } from "./dom.js";

const BINS = 60;
const WIDTH = 300;
const HEIGHT = 76;

/** A histogram of one column; a range of it is a set of samples. */
export class RangeFilter {
  /** @param on {select(indices, step), column(name)} */
  constructor(on) {
    this.on = on;
    this.picker = picker("Column", [], "", (name) => on.column(name));
    this.chart = element("svg:svg", { class: "histogram", viewBox: `0 0 ${WIDTH} ${HEIGHT + 18}`, role: "img" });
    this.sliders = ["lowest", "highest"].map((end, i) =>
      element("input", {
        type: "range",
        min: 0,
        max: 100,
        step: 0.1,
        value: 100 * i,
        "aria-label": `${end} percentile`,
        oninput: () => this.selectQuantiles(),
      }),
    );
    this.numbers = ["from", "to"].map((end) =>
      element("input", { type: "number", step: "any", "aria-label": `${end} value`, onchange: () => this.selectValues() }),
    );
    this.text = element("output", { class: "range" });
    this.node = element(
      "div",
      { class: "filter" },
      this.picker.node,
      this.chart,
      element("div", { class: "sliders" }, ...this.sliders),
      element("div", { class: "numbers" }, this.numbers[0], "to", this.numbers[1], this.text),
    );
    this.listen();
  }

  /** @param order samples by ascending value, NaN last. */
  setData(column, values, order) {
    Object.assign(this, { column, values, order });
    this.positions = layOut(values, column.scale);
    this.extent = extentOf(this.positions);
    this.finite = order.reduce((sum, i) => sum + !Number.isNaN(values[i]), 0);
    this.counts = this.countBins(order);
    this.sliders.forEach((slider, i) => (slider.value = 100 * i));
    this.numbers.forEach((number) => (number.value = ""));
    this.brush = null;
    this.chart.setAttribute("aria-label", `histogram of ${axisLabel(column)}`);
  }

  countBins(samples) {
    const counts = new Uint32Array(BINS);
    const [low, high] = this.extent;
    for (const i of samples) {
      const bin = Math.floor(((this.positions[i] - low) / (high - low)) * BINS);
      if (bin >= 0 && bin < BINS) counts[bin]++;
    }
    return counts;
  }

  setSelection(selection) {
    const selected = selection.count ? this.countBins(selection.indices) : null;
    const tallest = Math.max(1, ...this.counts);
    const bar = (count, bin, name) => {
      const height = count ? Math.max(1, (count / tallest) * HEIGHT) : 0;
      return element("svg:rect", {
        class: name,
        x: (bin * WIDTH) / BINS,
        y: HEIGHT - height,
        width: WIDTH / BINS - 1,
        height,
      });
    };
    const [low, high] = this.extent;
    const bars = Array.from(this.counts, (count, bin) => bar(count, bin, selected ? "bar rest" : "bar"));
    const chosen = selected ? Array.from(selected, (count, bin) => bar(count, bin, "bar")) : [];
    const ticks = axisTicks(this.extent, this.column.scale, 5).map(([u, text]) =>
      element("svg:text", { x: ((u - low) / (high - low)) * WIDTH, y: HEIGHT + 13, "text-anchor": "middle" }, text),
    );
    const [from, to] = this.brush ?? [0, 0];
    const brush = element("svg:rect", { class: "brush", x: from, y: 0, width: to - from, height: HEIGHT });
    this.chart.replaceChildren(...bars, ...chosen, ...ticks, brush);
  }

  listen() {
    const place = (event) => {
      const box = this.chart.getBoundingClientRect();
      return Math.min(WIDTH, Math.max(0, ((event.clientX - box.left) / box.width) * WIDTH));
    };
    let start = null;
    this.chart.onpointerdown = (event) => {
      start = place(event);
      this.chart.setPointerCapture(event.pointerId);
      event.preventDefault();
    };
    this.chart.onpointermove = (event) => {
      if (start === null) return;
      const end = place(event);
      this.brush = [Math.min(start, end), Math.max(start, end)];
      const rectangle = this.chart.querySelector(".brush");
      rectangle.setAttribute("x", this.brush[0]);
      rectangle.setAttribute("width", this.brush[1] - this.brush[0]);
    };
    this.chart.onpointerup = () => {
      start = null;
      if (!this.brush || this.brush[1] - this.brush[0] < 2) return;
      const [low, high] = this.extent;
      const [from, to] = this.brush.map((x) => toValue(low + (x / WIDTH) * (high - low), this.column.scale));
      this.select(from, to);
    };
  }

  /** Values at the percentiles of the sliders. */
  selectQuantiles() {
    this.brush = null;
    const [a, b] = this.sliders.map((slider) => Number(slider.value));
    const [from, to] = [Math.min(a, b), Math.max(a, b)].map(
      (percent) => this.values[this.order[Math.round((percent / 100) * (this.finite - 1))]],
    );
    this.select(from, to);
  }

  selectValues() {
    this.brush = null;
    const [from, to] = this.numbers.map((number) => (number.value === "" ? NaN : Number(number.value)));
    this.select(Number.isNaN(from) ? -Infinity : from, Number.isNaN(to) ? Infinity : to);
  }

  select(from, to) {
    const samples = this.order.filter((i) => this.values[i] >= from && this.values[i] <= to);
    this.text.textContent = `${valueText(from)} to ${valueText(to)}: ${countText(samples.length)}`;
    this.on.select(samples, { tool: "range", column: this.column.name, from: String(from), to: String(to) });
  }
}

/** One button a class; pressed classes are selected together. */
export class ClassChips {
  constructor(root, onSelect) {
    Object.assign(this, { root, onSelect });
    this.pressed = new Set();
  }

  setData(node) {
    this.node = node;
    this.pressed.clear();
    const counts = new Uint32Array(node.manifest.classes.length);
    for (const label of node.labels) if (label < counts.length) counts[label]++;
    this.chips = node.manifest.classes.map((name, label) =>
      element(
        "button",
        { type: "button", class: "chip", "aria-pressed": "false", onclick: () => this.press(label) },
        element("span", { class: "dot", style: `background:${classColour(label)}` }),
        name,
        element("small", {}, countText(counts[label])),
      ),
    );
    this.root.replaceChildren(...this.chips);
  }

  press(label) {
    if (this.pressed.has(label)) this.pressed.delete(label);
    else this.pressed.add(label);
    const { labels, manifest } = this.node;
    const samples = Array.from(labels.keys()).filter((i) => this.pressed.has(labels[i]));
    const classes = Array.from(this.pressed, (pressed) => manifest.classes[pressed]);
    const kept = new Set(this.pressed);
    this.onSelect(samples, { tool: "class", classes });
    this.pressed = kept; // a selection by another tool releases the chips
    this.paint();
  }

  release() {
    this.pressed = new Set();
    this.paint();
  }

  paint() {
    this.chips.forEach((chip, label) => chip.setAttribute("aria-pressed", String(this.pressed.has(label))));
  }
}
