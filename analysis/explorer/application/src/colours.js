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

const STEPS = 64;

export function classPalette(classes) {
  return classes.map((_, i) => CLASS_COLOURS[i % CLASS_COLOURS.length]);
}

export const classColour = (label) => CLASS_COLOURS[label % CLASS_COLOURS.length];

/** Colour of a share in [0, 1] on viridis, as [r, g, b]. */
export function sequenceColour(share) {
  const position = Math.min(1, Math.max(0, share)) * (SEQUENCE.length - 1);
  const low = Math.min(SEQUENCE.length - 2, Math.floor(position));
  const [a, b] = [rgb(SEQUENCE[low]), rgb(SEQUENCE[low + 1])];
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

/** Value of a custom property of the style sheet, such as "--grey", in the present colour scheme. */
export function themeColour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}
