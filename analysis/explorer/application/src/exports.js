// The selection as files: CSV, NumPy indices, JSON, and a snippet of Python.

import { download } from "./dom.js";

/** Name of a column in `sampimp.to_frame`: importance_L1 for importance:L1. */
const frameName = (name) => (name === "nll" ? "final_nll" : name.replace(":", "_"));

/** One row a sample, with the names of `sampimp.to_frame`: position, class, file, and every column of the run. */
export function toCsv({ node, runId, selection }) {
  const columns = node.columns(runId);
  const head = ["sample", "class_name", ...(node.names ? ["file"] : []), ...columns.map((column) => frameName(column.name))];
  const values = columns.map((column) => node.values(runId, column.name));
  const rows = Array.from(selection.indices, (i) => [
    node.id(i),
    node.className(i),
    ...(node.names ? [node.name(i)] : []),
    ...values.map((array) => (Number.isNaN(array[i]) ? "" : array[i])),
  ]);
  return [head, ...rows].map((row) => row.map(csvField).join(",")).join("\r\n") + "\r\n";
}

/** Quoted where CSV asks for it. A text that a spreadsheet would run as a formula begins with an apostrophe. */
function csvField(value) {
  if (typeof value === "number") return String(value);
  const text = /^[=+\-@\t\r]/.test(value) ? `'${value}` : value;
  return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
}

/** NumPy file, version 1.0, of the positions as int64. */
export function toNpy({ node, selection }) {
  const count = selection.count;
  const dictionary = `{'descr': '<i8', 'fortran_order': False, 'shape': (${count},), }`;
  const length = Math.ceil((10 + dictionary.length + 1) / 64) * 64;
  const header = `${dictionary.padEnd(length - 11)}\n`;
  const bytes = new Uint8Array(length + 8 * count);
  bytes.set([0x93, ...new TextEncoder().encode("NUMPY"), 1, 0, header.length & 255, header.length >> 8]);
  bytes.set(new TextEncoder().encode(header), 10);
  const view = new DataView(bytes.buffer, length);
  selection.indices.forEach((i, k) => view.setBigInt64(8 * k, BigInt(node.id(i)), true));
  return bytes;
}

export function toJson({ study, node, runId, selection }) {
  const { manifest } = node;
  return JSON.stringify(
    {
      study: study.root,
      data_set: manifest.name,
      run: runId,
      samples: node.count,
      count: selection.count,
      rule: "A polygon holds a sample by the even-odd rule; on an axis with scale log, edges are straight in log10.",
      steps: selection.steps,
      indices: Array.from(selection.indices, (i) => node.id(i)),
    },
    null,
    1,
  );
}

/** Python that trains on the selection alone, or on the rest. */
export function toSnippet({ node, selection }) {
  const name = fileName(node);
  return `import numpy as np
from torch.utils.data import Subset

selected = np.load("${name}.npy")  # ${selection.count} of ${node.count} positions in the training set
rest = np.setdiff1d(np.arange(len(train_set)), selected)

train_subset = Subset(train_set, selected.tolist())  # train_set: your training data, in the order of the study
train_rest = Subset(train_set, rest.tolist())  # the same without the selection
`;
}

const fileName = (node) => `selection-${node.manifest.name.replaceAll(/[^A-Za-z0-9]+/g, "-")}`;

export const EXPORTS = {
  CSV: (context) => download(`${fileName(context.node)}.csv`, toCsv(context), "text/csv"),
  ".npy": (context) => download(`${fileName(context.node)}.npy`, toNpy(context), "application/octet-stream"),
  JSON: (context) => download(`${fileName(context.node)}.json`, toJson(context), "application/json"),
  Python: (context) => download(`${fileName(context.node)}.py`, toSnippet(context), "text/x-python"),
};
