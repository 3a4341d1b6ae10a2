// A set of samples: which are selected, how the set was made, and its text in the URL.

/** Modes in which a tool's samples are combined with the selection. */
export const MODES = {
  replace: "Replace",
  add: "Add",
  remove: "Remove",
  intersect: "Intersect",
};

export class Selection {
  /** @param mask Uint8Array [N]: 1 where a sample is selected. @param steps how the set was made. */
  constructor(mask, steps = []) {
    this.mask = mask;
    this.steps = steps;
    this.count = mask.reduce((sum, selected) => sum + selected, 0);
  }

  static none(size) {
    return new Selection(new Uint8Array(size));
  }

  static of(size, indices, steps = []) {
    const mask = new Uint8Array(size);
    for (const i of indices) mask[i] = 1;
    return new Selection(mask, steps);
  }

  /** Selected samples in ascending order, Int32Array. */
  get indices() {
    if (!this.cached) {
      this.cached = new Int32Array(this.count);
      let k = 0;
      for (let i = 0; i < this.mask.length; i++) if (this.mask[i]) this.cached[k++] = i;
    }
    return this.cached;
  }

  /** Combine with the samples of a tool. @param step what the tool did, for the exported JSON. */
  combine(indices, mode, step) {
    const size = this.mask.length;
    const steps = mode === "replace" ? [step] : [...this.steps, step];
    if (mode === "replace") return Selection.of(size, indices, steps);
    if (mode === "intersect") {
      return Selection.of(
        size,
        Array.from(indices).filter((i) => this.mask[i]),
        steps,
      );
    }
    const mask = this.mask.slice();
    const value = mode === "add" ? 1 : 0;
    for (const i of indices) mask[i] = value;
    return new Selection(mask, steps);
  }

  invert() {
    const mask = this.mask.map((selected) => 1 - selected);
    return new Selection(mask, [...this.steps, { tool: "invert" }]);
  }
}

/** Text of a set in a URL: positions if they are few, else the shorter of gaps and a bitset. */
export function encodeSet(selection) {
  const { mask, indices } = selection;
  if (indices.length <= 40) return indices.join(",");
  const gaps = encodeGaps(indices);
  if (gaps.length * 8 < mask.length) return `gaps:${toBase64(gaps)}`;
  const bits = new Uint8Array(Math.ceil(mask.length / 8));
  for (const i of indices) bits[i >> 3] |= 1 << (i & 7);
  return `bits:${toBase64(bits)}`;
}

/** Mask of a set from its text; samples that do not exist are left out. */
export function decodeSet(text, size) {
  const mask = new Uint8Array(size);
  const [form, data] = text.includes(":") ? text.split(":") : ["list", text];
  if (form === "list") {
    for (const part of data.split(",")) if (/^\d+$/.test(part) && +part < size) mask[+part] = 1;
  } else if (form === "gaps") {
    for (const i of decodeGaps(fromBase64(data), size)) mask[i] = 1;
  } else if (form === "bits") {
    const bits = fromBase64(data);
    for (let i = 0; i < Math.min(size, bits.length * 8); i++) mask[i] = (bits[i >> 3] >> (i & 7)) & 1;
  }
  return mask;
}

/** Lengths of the alternating runs of absent and present samples, as variable-length integers. */
function encodeGaps(indices) {
  const bytes = [];
  const write = (value) => {
    for (; value > 127; value >>>= 7) bytes.push((value & 127) | 128);
    bytes.push(value);
  };
  let end = 0; // first sample after the last run
  for (let k = 0; k < indices.length; ) {
    const first = indices[k];
    let length = 1;
    while (indices[k + length] === first + length) length++;
    write(first - end);
    write(length);
    end = first + length;
    k += length;
  }
  return Uint8Array.from(bytes);
}

function* decodeGaps(bytes, size) {
  let position = 0;
  let value = 0;
  let shift = 0;
  let present = false;
  for (const byte of bytes) {
    value |= (byte & 127) << shift;
    shift += 7;
    if (byte & 128) continue;
    if (value < 0) return;
    const end = Math.min(size, position + value);
    if (present) for (let i = position; i < end; i++) yield i;
    position += value;
    [value, shift, present] = [0, 0, !present];
  }
}

function toBase64(bytes) {
  let binary = "";
  for (const byte of bytes) binary += String.fromCharCode(byte);
  return btoa(binary).replaceAll("+", "-").replaceAll("/", "_").replaceAll("=", "");
}

function fromBase64(text) {
  try {
    const binary = atob(text.replaceAll("-", "+").replaceAll("_", "/"));
    return Uint8Array.from(binary, (letter) => letter.charCodeAt(0));
  } catch {
    return new Uint8Array(0);
  }
}
