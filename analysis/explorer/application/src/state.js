// The state of the explorer, and its text in the URL's fragment, so that a copied URL restores everything.

import { decodeSet, encodeSet, Selection } from "./selection.js";

/** Default axes of the two scatters, where the study has these columns. */
const AXES = [
  { x: "nll", y: "importance" },
  { x: "mean_epoch", y: "importance" },
];
const RANGES = ["importance", "nll", "mean_epoch"];

/** Initial state of a node. */
export function initialState(node) {
  const run = node.manifest.runs[0].id;
  const names = node.columns(run).map((column) => column.name);
  const known = (name, k) => (names.includes(name) ? name : names[k % names.length]);
  return {
    run,
    plots: AXES.map(({ x, y }, k) => ({ x: known(x, k), y: known(y, 0), linear: "", view: null })),
    colour: "class",
    tool: "lasso",
    mode: "replace",
    selection: Selection.none(node.count),
    named: new Map(),
    sample: -1, // the first of the sorted samples
    sort: { name: known("importance", 0), descending: true },
    row: "total",
    target: "", // of influence by epoch; the first one that the run has
    ranges: RANGES.map(known),
    compare: { column: known("importance", 0), runs: [run, (node.manifest.runs[1] ?? node.manifest.runs[0]).id] },
  };
}

/** Text of a state; what has its initial value is left out. */
export function encodeState(node, state) {
  const initial = initialState(node);
  const parts = new URLSearchParams();
  const put = (key, value, normal) => {
    if (value !== normal) parts.set(key, value);
  };
  put("node", node.manifest.name, undefined);
  put("run", state.run, initial.run);
  state.plots.forEach((plot, k) => {
    put(`x${k}`, plot.x, initial.plots[k].x);
    put(`y${k}`, plot.y, initial.plots[k].y);
    put(`linear${k}`, plot.linear, "");
    if (plot.view) {
      const { scale, shiftX, shiftY } = plot.view;
      parts.set(`view${k}`, [scale, shiftX, shiftY].map((value) => value.toPrecision(6)).join(","));
    }
  });
  put("colour", state.colour, initial.colour);
  put("tool", state.tool, initial.tool);
  put("mode", state.mode, initial.mode);
  if (state.sample >= 0) parts.set("sample", node.id(state.sample));
  put("sort", `${state.sort.name}${state.sort.descending ? "" : ":ascending"}`, initial.sort.name);
  put("row", state.row, initial.row);
  put("target", state.target, initial.target);
  state.ranges.forEach((name, k) => put(`range${k}`, name, initial.ranges[k]));
  put("compare", JSON.stringify(state.compare), JSON.stringify(initial.compare));
  if (state.selection.count) parts.set("select", encodeSet(positions(node, state.selection)));
  if (state.selection.steps.length) parts.set("steps", JSON.stringify(state.selection.steps));
  for (const [name, selection] of state.named) parts.append("named", `${encodeSet(positions(node, selection))} ${name}`);
  return parts.toString();
}

/** State of a text; what does not exist in the study keeps its initial value. */
export function decodeState(node, text) {
  const parts = new URLSearchParams(text);
  const state = initialState(node);
  const runs = node.manifest.runs.map((run) => run.id);
  const take = (key, allowed, normal) => (allowed.includes(parts.get(key)) ? parts.get(key) : normal);
  state.run = take("run", runs, state.run);
  const names = node.columns(state.run).map((column) => column.name);
  state.plots.forEach((plot, k) => {
    plot.x = take(`x${k}`, names, plot.x);
    plot.y = take(`y${k}`, names, plot.y);
    plot.linear = take(`linear${k}`, ["x", "y", "xy"], "");
    const view = (parts.get(`view${k}`) ?? "").split(",").map(Number);
    if (view.length === 3 && view.every(Number.isFinite) && view[0] > 0) {
      plot.view = { scale: view[0], shiftX: view[1], shiftY: view[2] };
    }
  });
  state.colour = take("colour", ["class", ...names], state.colour);
  state.tool = take("tool", ["pan", "lasso", "rectangle"], state.tool);
  state.mode = take("mode", ["replace", "add", "remove", "intersect"], state.mode);
  if (parts.has("sample")) state.sample = node.sampleOf(Number(parts.get("sample")));
  const [sort, direction] = (parts.get("sort") ?? state.sort.name).split(/:(ascending)$/);
  if (names.includes(sort)) state.sort = { name: sort, descending: direction !== "ascending" };
  state.row = parts.get("row") ?? state.row;
  state.target = parts.get("target") ?? state.target;
  state.ranges = state.ranges.map((name, k) => take(`range${k}`, names, name));
  const compare = parseJson(parts.get("compare"));
  if (names.includes(compare?.column)) state.compare.column = compare.column;
  if (Array.isArray(compare?.runs) && compare.runs.length === 2 && compare.runs.every((run) => runs.includes(run))) {
    state.compare.runs = compare.runs;
  }
  const steps = parseJson(parts.get("steps"));
  state.selection = samplesOf(node, parts.get("select") ?? "", Array.isArray(steps) ? steps : []);
  if (state.sample < 0 && state.selection.count === 1) state.sample = state.selection.indices[0];
  for (const item of parts.getAll("named")) {
    const [set, ...words] = item.split(" ");
    state.named.set(words.join(" "), samplesOf(node, set, []));
  }
  return state;
}

/** The set by positions in the training set, which outlast a thinning of the samples. */
function positions(node, selection) {
  return node.ids ? Selection.of(node.ids.at(-1) + 1, selection.indices.map((i) => node.id(i))) : selection;
}

function samplesOf(node, text, steps) {
  if (!node.ids) return new Selection(decodeSet(text, node.count), steps);
  const mask = decodeSet(text, node.ids.at(-1) + 1);
  return new Selection(Uint8Array.from(node.ids, (id) => mask[id]), steps);
}

function parseJson(text) {
  try {
    return JSON.parse(text);
  } catch {
    return null;
  }
}
