// Positions and ticks of an axis: values are laid out as u = value, or u = log10(value) on a logarithmic axis.

import { ticks } from "d3-array";
import { valueText } from "./dom.js";

/** Positions u [N], float64. On a logarithmic axis, zero and below have none (NaN). */
export function layOut(values, scale) {
  const positions = Float64Array.from(values);
  if (scale === "log") {
    for (let i = 0; i < positions.length; i++) {
      positions[i] = positions[i] > 0 ? Math.log10(positions[i]) : NaN;
    }
  }
  for (let i = 0; i < positions.length; i++) if (!Number.isFinite(positions[i])) positions[i] = NaN;
  return positions;
}

export const toValue = (u, scale) => (scale === "log" ? 10 ** u : u);
export const toPosition = (value, scale) => (scale === "log" ? Math.log10(value) : value);

/** Extent of positions with a margin of 4 %; NaN is left out. */
export function extentOf(positions) {
  let [low, high] = [Infinity, -Infinity];
  for (const u of positions) {
    if (u < low) low = u;
    if (u > high) high = u;
  }
  if (!(low <= high)) return [0, 1];
  const margin = high > low ? 0.04 * (high - low) : 0.5;
  return [low - margin, high + margin];
}

/** Ticks between two positions: [[u, text], ...]. */
export function axisTicks([low, high], scale, count) {
  if (scale !== "log") return ticks(low, high, count).map((u) => [u, tickText(u)]);
  if (high - low > 1.2) {
    const step = Math.max(1, Math.ceil((high - low) / count));
    const first = Math.ceil(low / step);
    const exponents = Array.from({ length: Math.floor(high / step) - first + 1 }, (_, i) => (first + i) * step);
    return exponents.map((u) => [u, powerText(u)]);
  }
  return ticks(10 ** low, 10 ** high, count).map((value) => [Math.log10(value), tickText(value)]);
}

/** A value in as few digits as it has: 1e-4, not 1.000e-4. */
const tickText = (value) => valueText(value).replace(/\.?0+(?=e)/, "");

/** A power of ten: 10⁻³. */
export function powerText(exponent) {
  const digits = { "-": "⁻", 0: "⁰", 1: "¹", 2: "²", 3: "³", 4: "⁴", 5: "⁵", 6: "⁶", 7: "⁷", 8: "⁸", 9: "⁹" };
  return `10${Array.from(String(exponent), (letter) => digits[letter]).join("")}`;
}

/** Label of a column with its unit. */
export const axisLabel = (column) =>
  column.unit && column.unit !== "1" ? `${column.label} (${unitText(column.unit)})` : column.label;

/** A unit in writing: "parameter^2" as "parameter²". */
export const unitText = (unit) => (unit ?? "").replace("^2", "²");
