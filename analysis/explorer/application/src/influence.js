// Influence of one sample on a target, by layer and epoch, with a picker of the target.
//
// A code of 16 bits is a sign and a magnitude on a logarithmic scale by layer, within 0.1 %; sampimp.analysis.explorer.histories
// has the scale.

import { divergingColours, heatmap } from "./charts.js";
import { element, picker } from "./dom.js";

const [NAN, ZERO, POSITIVE, MINUS_INFINITE, INFINITE] = [0, 1, 32768, 65534, 65535];

function decodeSigned({ low, high }, code) {
  if (code === NAN) return NaN;
  if (code === ZERO) return 0;
  if (code >= MINUS_INFINITE) return code === INFINITE ? Infinity : -Infinity;
  const step = code < POSITIVE ? code - 2 : code - POSITIVE;
  const magnitude = Math.exp(low + (step / 32765) * (high - low));
  return code < POSITIVE ? -magnitude : magnitude;
}

/** Load the influence of a sample: [{name of the layer, values [E]}, ...]. @param part its entry in the manifest */
async function loadRows(node, part, sample) {
  const file = part.files[Math.floor(sample / part.page)];
  if (!node.pages.has(file)) node.pages.set(file, node.loadCodes(file));
  const codes = await node.pages.get(file);
  const epochs = part.epochs.length;
  const stride = codes.length / (part.rows.length * epochs);
  return part.rows.map((row, r) => ({
    name: row.layer,
    values: Float32Array.from({ length: epochs }, (_, e) => decodeSigned(row, codes[(r * epochs + e) * stride + (sample % part.page)])),
  }));
}

export class InfluencePane {
  /** @param onTarget called with the target that is chosen */
  constructor(onTarget) {
    this.onTarget = onTarget;
    this.head = element("div", { class: "influence-head" });
    this.heat = element("div", {});
    this.root = element("div", { class: "influence" }, this.head, this.heat);
  }

  /** Show a run's influence on a target, or on its first one if it has no such target; nothing if it has none. */
  async show(node, runId, sample, target) {
    const parts = node.manifest.influence.filter((part) => part.run === runId);
    this.root.hidden = !parts.length;
    if (!parts.length) return;
    const part = parts.find((each) => each.target === target) ?? parts[0];
    this.part = part;
    this.sample = sample;
    this.showPicker(parts, part);
    this.heat.replaceChildren();
    const rows = await loadRows(node, part, sample);
    if (this.part !== part || this.sample !== sample) return; // another one was chosen meanwhile
    const name = `influence on ${part.target}`;
    this.heat.replaceChildren(heatmap(rows, part.epochs, part.unit, { name, colours: divergingColours }));
  }

  /** The picker stays in the page while the targets are the same, and keeps the focus. */
  showPicker(parts, part) {
    const key = JSON.stringify(parts.map((each) => each.target));
    if (this.key !== key) {
      const targets = parts.map((each) => [each.target, each.target]);
      const { node, select } = picker("on", targets, part.target, this.onTarget);
      this.select = select;
      select.setAttribute("aria-label", "Target of influence");
      this.head.replaceChildren(element("h3", {}, "Influence by layer and epoch"), node);
      this.key = key;
    }
    this.select.value = part.target;
  }
}
