// When and where samples acted: the mean history of the selection against the rest, and by layer and epoch.

import { unitText } from "./axes.js";
import { EpochChart, heatmap } from "./charts.js";
import { picker } from "./dom.js";
import { TOTAL } from "./history.js";

const by = (id) => document.getElementById(id);

export class HistoryPanel {
  /** @param onRow called with the key of the row that is chosen: "total", or its number */
  constructor(onRow) {
    this.onRow = onRow;
    this.chart = new EpochChart(by("history"));
  }

  /** Offer the rows of a history, or say which runs have one. Returns the key of the row that is shown. */
  showPicker(node, history, row) {
    if (!history) {
      const held = node.manifest.histories.map((other) => other.run).join(", ");
      by("history-row").replaceChildren(held ? `This folder holds the history of ${held}.` : "This folder holds no history.");
      return row;
    }
    const rows = [
      ["total", "importance, all layers"],
      ...history.layers.map((r) => [String(r), `importance, ${history.rows[r].layer}`]),
      ...(history.nll >= 0 ? [[String(history.nll), "NLL"]] : []),
    ];
    const shown = rows.some(([key]) => key === row) ? row : "total";
    by("history-row").replaceChildren(picker("Mean of", rows, shown, this.onRow).node);
    return shown;
  }

  /** @param history of the run, or undefined; nothing is shown before it is loaded */
  show(node, history, selection, rowKey) {
    const isShown = Boolean(history?.isLoaded);
    for (const id of ["history", "history-note", "history-heat"]) by(id).hidden = !isShown;
    if (!isShown) return;
    const row = rowKey === "total" ? TOTAL : Number(rowKey);
    const { selected, rest } = history.compare(selection, row);
    const line = (label, summary, colour) => ({ label, values: summary.mean, low: summary.low, high: summary.high, colour });
    const lines = selection.count ? [line("selection", selected, "--accent")] : [];
    if (selection.count < node.count) lines.push(line(selection.count ? "rest" : "all", rest, "--rest"));
    const { units } = node.manifest;
    if (row === history.nll) {
      this.chart.draw(history.epochs, lines, `NLL (${units.nll})`);
      by("history-heat").replaceChildren();
      return;
    }
    this.chart.draw(history.epochs, lines, `importance (${unitText(units.importance)})`);
    const { layers } = selection.count ? selected : rest;
    const rows = layers.map((values, k) => ({ name: history.rows[history.layers[k]].layer, values }));
    by("history-heat").replaceChildren(heatmap(rows, history.epochs, units.importance));
  }
}
