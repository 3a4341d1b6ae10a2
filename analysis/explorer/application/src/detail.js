// One sample: its picture, its columns, its history by layer and epoch, its influence, and its NLL.

import { axisLabel } from "./axes.js";
import { EpochChart, heatmap } from "./charts.js";
import { element, valueText } from "./dom.js";
import { InfluencePane } from "./influence.js";
import { picture, rowText } from "./thumbnails.js";

const EDGE = 128; // pixels of the picture

export class SampleDetail {
  /** @param onTarget called with the target of influence that is chosen */
  constructor(root, onTarget) {
    this.root = root;
    this.influence = new InfluencePane(onTarget);
    this.chartBox = element("div", {});
    this.chart = new EpochChart(this.chartBox, 130);
  }

  /** @param history of the run, or undefined; @param target whose influence is shown, if the run has it */
  async show(node, runId, sample, history, target) {
    const key = `${runId} ${sample}`;
    this.key = key;
    const facts = [
      ["sample", String(node.id(sample))],
      ["class", node.className(sample)],
      ...(node.name(sample) ? [["file", node.name(sample)]] : []),
      ...node.columns(runId).map((column) => [
        axisLabel(column),
        valueText(node.values(runId, column.name)[sample]),
      ]),
    ];
    const list = element("dl", {}, ...facts.flatMap(([name, value]) => [element("dt", {}, name), element("dd", {}, value)]));
    const scroll = element("div", { class: "facts", tabindex: 0, role: "region", "aria-label": "Numbers of the sample" }, list);
    const parts = [await this.largePicture(node, sample), scroll];
    if (history) {
      const values = await history.sample(sample);
      const epochs = history.epochs.length;
      const rows = history.layers.map((r) => ({
        name: history.rows[r].layer,
        values: values.subarray(r * epochs, (r + 1) * epochs),
      }));
      const charts = element("div", {}, element("h3", {}, "Importance by layer and epoch"));
      charts.append(heatmap(rows, history.epochs, node.manifest.units.importance), this.influence.root);
      if (history.nll >= 0) {
        charts.append(element("h3", {}, "NLL by epoch"), this.chartBox);
        this.nllValues = Array.from(values.subarray(history.nll * epochs, (history.nll + 1) * epochs));
      }
      parts.push(charts);
    } else {
      parts.push(element("p", { class: "wide" }, "This folder holds no history of the run."));
    }
    if (this.key !== key) return; // another sample was chosen meanwhile
    this.root.replaceChildren(...parts);
    const influence = history && this.influence.show(node, runId, sample, target);
    if (history && history.nll >= 0) {
      const line = { label: "NLL", values: this.nllValues, colour: "--accent" };
      this.chart.draw(history.epochs, [line], `NLL (${node.manifest.units.nll})`);
    }
    await influence;
  }

  async largePicture(node, sample) {
    const { sprites, rows } = node.manifest;
    if (sprites) return picture(node, sample, EDGE);
    const text = rows ? rowText(await node.row(sample), rows.columns) : "no image";
    return element("span", { class: "words" }, text);
  }
}
