// Line charts by epoch (uPlot), and heatmaps of layer by epoch.

import uPlot from "uplot";
import { divergingColour, sequenceColour, themeColour } from "./colours.js";
import { powerText, unitText } from "./axes.js";
import { element, valueText } from "./dom.js";

const WHOLE_STEPS = [1, 2, 5].flatMap((digit) => [0, 1, 2, 3, 4].map((power) => digit * 10 ** power)).sort((a, b) => a - b);

const positive = (values) => values.map((value) => (value > 0 && value < Infinity ? value : null));

/** A chart of lines by epoch that keeps the width of its element. Values at or below 0 are gaps. */
export class EpochChart {
  constructor(root, height = 190) {
    Object.assign(this, { root, height });
    this.plots = new Map(); // key of the lines -> plot: to draw other values in one is quick, to create one is not
    // The width is kept: to read it after a change of the page would lay it out at once.
    new ResizeObserver(() => {
      this.width = root.clientWidth;
      this.fit();
    }).observe(root);
  }

  /**
   * @param epochs [E]
   * @param lines [{label, values [E], colour (a custom property), low, high (optional)}, ...]
   * @param label of the vertical axis
   */
  draw(epochs, lines, label) {
    const key = JSON.stringify([label, lines.map((line) => [line.label, line.colour, !line.low])]);
    const data = [epochs];
    for (const { values, low, high } of lines) {
      data.push(positive(values), ...(low ? [positive(low), positive(high)] : []));
    }
    if (this.plots.has(key)) this.plots.get(key).setData(data);
    else this.plots.set(key, this.create(data, lines, label));
    const plot = this.plots.get(key);
    if (plot === this.plot) return;
    this.plot = plot;
    this.root.replaceChildren(plot.root);
    this.fit();
  }

  fit() {
    if (this.plot && this.width && this.width !== this.plot.width) this.plot.setSize({ width: this.width, height: this.height });
  }

  /** Draw again in the colours of the present scheme. */
  restyle() {
    for (const plot of this.plots.values()) plot.destroy();
    this.plots.clear();
    this.plot = null;
  }

  create(data, lines, label) {
    const text = themeColour("--text");
    const line = { stroke: themeColour("--line"), width: 1 };
    const font = { font: "11px system-ui", labelFont: "12px system-ui", labelSize: 18, stroke: text };
    const series = [{ label: "epoch" }];
    const bands = [];
    for (const { label: name, colour, low } of lines) {
      const stroke = themeColour(colour);
      series.push({ label: name, stroke, width: 2, value: legendText });
      if (!low) continue;
      const first = series.length;
      const edge = { stroke: "transparent", points: { show: false }, value: legendText };
      series.push({ ...edge, label: "10 %" }, { ...edge, label: "90 %" });
      bands.push({ series: [first + 1, first], fill: `${stroke}33` });
    }
    return new uPlot(
      {
        width: this.width || Math.max(200, this.root.clientWidth),
        height: this.height,
        series,
        bands,
        legend: { live: true },
        cursor: { drag: { x: false, y: false } },
        scales: { x: { time: false }, y: { distr: 3 } },
        axes: [
          { ...font, label: "epoch", size: 28, grid: line, ticks: line, incrs: WHOLE_STEPS },
          {
            ...font,
            label,
            size: 50,
            filter: labelled,
            grid: { ...line, filter: labelled },
            ticks: { ...line, filter: labelled },
            values: (_, splits) => splits.map((value) => (value === null ? "" : isPower(value) ? powerText(Math.round(Math.log10(value))) : valueText(value))),
          },
        ],
      },
      data,
    );
  }
}

const legendText = (_, value) => (value === null || value === undefined ? "–" : valueText(value));

const isPower = (value) => value > 0 && Math.abs(Math.log10(value) - Math.round(Math.log10(value))) < 1e-9;

/** The values of a logarithmic axis that get a label: powers of ten, or every fourth value if there is only one. */
function labelled(_, splits) {
  const powers = splits.filter(isPower).length;
  const step = Math.ceil(powers / 6);
  return splits.map((value, i) =>
    (powers > 1 ? isPower(value) && Math.round(Math.log10(value)) % step === 0 : i % 4 === 0) ? value : null,
  );
}

/** Logarithmic colours from the smallest to the largest positive value, and zero in the lowest colour. */
export function sequenceColours(values) {
  const shown = values.filter((value) => value > 0 && value < Infinity);
  const [low, high] = [Math.min(...shown), Math.max(...shown)].map(Math.log);
  return {
    colour: (value) => sequenceColour(value > 0 ? (Math.log(value) - low) / (high - low || 1) : 0),
    ends: shown.length ? [Math.exp(low), Math.exp(high)] : null,
    ramp: "ramp",
  };
}

/** Linear colours about 0, as far in both directions as the largest magnitude. */
export function divergingColours(values) {
  const most = Math.max(0, ...values.filter(Number.isFinite).map(Math.abs));
  return {
    colour: (value) => divergingColour(value / (most || 1)),
    ends: values.every(Number.isNaN) ? null : [-most, most],
    ramp: "ramp diverging",
  };
}

/**
 * Heatmap of layer by epoch, empty where nothing was measured.
 * @param rows [{name, values [E]}, ...]
 * @param name of what is shown, for its label; @param colours function of the values: {colour(value), ends, ramp}
 */
export function heatmap(rows, epochs, unit, { name = "importance", colours = sequenceColours } = {}) {
  const { colour, ends, ramp } = colours(rows.flatMap((row) => Array.from(row.values)));
  const [low, high, units] = ends ? [...ends.map(valueText), unitText(unit)] : ["", "nothing measured", ""];
  const height = rows.length > 20 ? 8 : 18;
  const canvas = element("canvas", { width: epochs.length, height: rows.length, class: "heatmap", role: "img" });
  canvas.style.height = `${height * rows.length}px`;
  const range = ends ? `${low} to ${high} ${units}` : high;
  canvas.setAttribute("aria-label", `${name} by layer (${rows.length}) and epoch (${epochs.length}), ${range}`);
  const context = canvas.getContext("2d");
  rows.forEach((row, r) =>
    row.values.forEach((value, e) => {
      if (Number.isNaN(value)) return;
      context.fillStyle = `rgb(${colour(value)})`;
      context.fillRect(e, r, 1, 1);
    }),
  );
  canvas.onmousemove = (event) => {
    const e = Math.floor((event.offsetX / canvas.clientWidth) * epochs.length);
    const r = Math.floor((event.offsetY / canvas.clientHeight) * rows.length);
    if (!rows[r] || !(e in epochs)) return;
    const value = rows[r].values[e];
    canvas.title = `${rows[r].name}, epoch ${epochs[e]}: ${valueText(value)}${Number.isNaN(value) ? "" : ` ${unitText(unit)}`}`;
  };
  const names = rows.map((row, r) =>
    element("span", { style: `height:${height}px` }, rows.length <= 20 || r % 5 === 0 ? row.name : ""),
  );
  const scale = element(
    "div",
    { class: "scale" },
    element("span", {}, low),
    element("span", { class: ramp }),
    element("span", {}, high),
    element("span", {}, units),
  );
  return element(
    "figure",
    { class: "heat" },
    element("div", { class: "names" }, ...names),
    element(
      "div",
      { class: "cells" },
      canvas,
      element("div", { class: "epochs" }, element("span", {}, `epoch ${epochs[0]}`), element("span", {}, `${epochs.at(-1)}`)),
    ),
    scale,
  );
}
