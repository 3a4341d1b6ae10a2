// Colours of points, by class or by the value of a column.

/** Okabe and Ito's palette without black, then Tol's muted colours: distinct under colour blindness. */
const CLASS_COLOURS = [
  "#e69f00", "#56b4e9", "#009e73", "#d8c400", "#0072b2", "#d55e00", "#cc79a7",
  "#882255", "#44aa99", "#999933", "#aa4499", "#117733", "#88ccee", "#ddcc77",
];

/** Samples of viridis, from low to high. */
const SEQUENCE = [
  "#440154", "#482475", "#414487", "#355f8d", "#2a788e", "#21918c", "#22a884", "#44bf70", "#7ad151", "#bddf26", "#fde725",
];

/** Brewer's RdBu without its darkest ends, from negative (blue) over zero to positive (red). */
const DIVERGING = ["#2166ac", "#4393c3", "#92c5de", "#d1e5f0", "#f7f7f7", "#fddbc7", "#f4a582", "#d6604d", "#b2182b"];

const STEPS = 64;

export function classPalette(classes) {
  return classes.map((_, i) => CLASS_COLOURS[i % CLASS_COLOURS.length]);
}

export const classColour = (label) => CLASS_COLOURS[label % CLASS_COLOURS.length];

/** Colour of a share in [0, 1] on viridis, as [r, g, b]. */
export const sequenceColour = (share) => between(SEQUENCE, share);

/** Colour of a share in [-1, 1], as [r, g, b]: blue, nearly white at 0, red. */
export const divergingColour = (share) => between(DIVERGING, (share + 1) / 2);

function between(colours, share) {
  const position = Math.min(1, Math.max(0, share)) * (colours.length - 1);
  const low = Math.min(colours.length - 2, Math.floor(position));
  const [a, b] = [rgb(colours[low]), rgb(colours[low + 1])];
  return a.map((value, i) => Math.round(value + (b[i] - value) * (position - low)));
}

/** Palette of a column: 64 steps of viridis. */
export const sequencePalette = () =>
  Array.from({ length: STEPS }, (_, i) => {
    const [r, g, b] = sequenceColour(i / (STEPS - 1));
    return `#${[r, g, b].map((value) => value.toString(16).padStart(2, "0")).join("")}`;
  });

/** Step of each sample on the palette of a column, by its rank; NaN has the lowest step. */
export function sequenceSteps(order, values) {
  const steps = new Uint8Array(values.length);
  const finite = values.reduce((sum, value) => sum + !Number.isNaN(value), 0);
  for (let k = 0; k < finite; k++) steps[order[k]] = Math.floor((k * STEPS) / finite);
  return steps;
}

export function rgb(hex) {
  return [1, 3, 5].map((start) => parseInt(hex.slice(start, start + 2), 16));
}

const theme = new Map();
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => theme.clear());

/** Value of a custom property of the style sheet, such as "--grey", in the present colour scheme. */
export function themeColour(name) {
  // Kept: to read a style after a change of the page would compute all styles at once.
  if (!theme.has(name)) theme.set(name, getComputedStyle(document.documentElement).getPropertyValue(name).trim());
  return theme.get(name);
}
