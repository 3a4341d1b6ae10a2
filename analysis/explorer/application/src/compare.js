// Two runs side by side: percentile rank against percentile rank, and the ranks of samples as slopes.

import { percentileRanks } from "./data.js";
import { countText, element } from "./dom.js";
import { Scatter } from "./scatter.js";

const SLOPES = 150; // lines drawn; more are a blur
const WIDTH = 260;
const HEIGHT = 300;
const [TOP, SIDE] = [26, 50];

export class RunComparison {
  constructor(root, on, tool) {
    this.plot = element("div", { class: "scatter small" });
    this.slopes = element("svg:svg", { class: "slopes", viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img" });
    this.text = element("p", { class: "correlation" });
    root.replaceChildren(this.text, element("div", { class: "pair" }, this.plot, this.slopes));
    this.scatter = new Scatter(this.plot, on, tool);
  }

  /** @param column that is compared; @param runs [A, B] ids of loaded runs */
  setData({ node, column, runs, colours, palette, grey }) {
    Object.assign(this, { node, runs });
    this.ranks = runs.map((id) => percentileRanks(node.values(id, column.name), node.order(id, column.name)));
    const axis = (k) => ({
      column: { name: `rank of ${column.name} in ${runs[k]}`, label: `percentile in ${runs[k]}`, unit: "%" },
      values: this.ranks[k],
      scale: "linear",
    });
    this.text.textContent =
      runs[0] === runs[1]
        ? "Choose two runs."
        : `Rank correlation (Spearman) ${correlation(...this.ranks).toFixed(3)} over ${countText(this.ranks[0].length)} samples.`;
    return this.scatter.setData({ x: axis(0), y: axis(1), colours, palette, grey });
  }

  /** Draw the slopes of the selected samples, and of the marked one. */
  setSelection(selection, marked) {
    this.scatter.mark(marked);
    const place = (rank) => TOP + (1 - rank / 100) * (HEIGHT - 2 * TOP);
    const step = Math.max(1, Math.ceil(selection.count / SLOPES));
    const shown = selection.indices.filter((_, k) => k % step === 0);
    const line = (sample, name) =>
      element("svg:line", {
        class: name,
        x1: SIDE,
        x2: WIDTH - SIDE,
        y1: place(this.ranks[0][sample]),
        y2: place(this.ranks[1][sample]),
      });
    const finite = (sample) => !Number.isNaN(this.ranks[0][sample] + this.ranks[1][sample]);
    const axis = (x, anchor, name) => [
      element("svg:line", { class: "tick", x1: x, x2: x, y1: TOP, y2: HEIGHT - TOP }),
      ...[0, 50, 100].map((rank) =>
        element("svg:text", { x: anchor === "end" ? x - 4 : x + 4, y: place(rank) + 4, "text-anchor": anchor }, `${rank}`),
      ),
      element("svg:text", { x, y: 12, "text-anchor": "middle" }, name),
    ];
    this.slopes.replaceChildren(
      ...axis(SIDE, "end", this.runs[0]),
      ...axis(WIDTH - SIDE, "start", this.runs[1]),
      ...Array.from(shown).filter(finite).map((sample) => line(sample, "slope")),
      ...(marked >= 0 && finite(marked) ? [line(marked, "slope marked")] : []),
    );
    this.slopes.setAttribute("aria-label", `percentile ranks of ${shown.length} selected samples in both runs`);
    return this.scatter.setSelection(selection);
  }
}

/** Pearson correlation of two arrays where both are finite. */
function correlation(a, b) {
  let [n, sumA, sumB, sumAA, sumBB, sumAB] = [0, 0, 0, 0, 0, 0];
  for (let i = 0; i < a.length; i++) {
    if (Number.isNaN(a[i] + b[i])) continue;
    n++;
    sumA += a[i];
    sumB += b[i];
    sumAA += a[i] * a[i];
    sumBB += b[i] * b[i];
    sumAB += a[i] * b[i];
  }
  const covariance = sumAB - (sumA * sumB) / n;
  return covariance / Math.sqrt((sumAA - (sumA * sumA) / n) * (sumBB - (sumB * sumB) / n));
}
