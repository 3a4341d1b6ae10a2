// Histories of a run: importance by layer and epoch, and NLL by epoch, of every sample.
//
// Values are stored as codes of 16 bits on a logarithmic scale by row (a layer, or the NLL), within 0.1 %. Of a set
// with more than half of the samples, the others are summed and subtracted from the sums of all.

const BIN_SHIFT = 18; // of the bits of a float32: bins of 3 %
const BINS = 8192;
const TOTAL = -1; // row: importance summed over the layers

const bits = new Uint32Array(1);
const float = new Float32Array(bits.buffer);

const [NAN, ZERO, INFINITE] = [0, 1, 65535];

/**
 * Factors of a row's values: a code is decoded as high[code >> 8] * low[code & 255]. Two tables of 256 values stay in the
 * processor's first cache, which a table of all 65,536 does not.
 */
function factorsOf({ low, high }) {
  const step = (high - low) / 65532;
  return {
    high: Float64Array.from({ length: 256 }, (_, i) => Math.exp(low + (256 * i - 2) * step)),
    low: Float64Array.from({ length: 256 }, (_, i) => Math.exp(i * step)),
  };
}

function decodeValue(factors, code) {
  if (code > ZERO && code < INFINITE) return factors.high[code >> 8] * factors.low[code & 255];
  return code === ZERO ? 0 : code === NAN ? NaN : Infinity;
}

export class History {
  constructor(node, manifest) {
    Object.assign(this, { node, manifest, epochs: manifest.epochs, rows: manifest.rows });
    this.factors = this.rows.map(factorsOf);
    this.layers = this.rows.flatMap((row, r) => (row.variable === "importance" ? [r] : []));
    this.nll = this.rows.findIndex((row) => row.variable === "nll");
    this.pages = [];
    this.ofAll = new Map(); // row -> summary of all samples
  }

  /** Load every page. */
  async load() {
    for (let page = 0; page < this.manifest.files.length; page++) await this.loadPage(page);
    this.isLoaded = true;
  }

  async loadPage(page) {
    this.pages[page] ??= await this.node.historyPage(this.manifest, page);
    return this.pages[page];
  }

  /** Values of one sample, Float32Array [rows * epochs]. */
  async sample(sample) {
    const { page } = this.manifest;
    const codes = await this.loadPage(Math.floor(sample / page));
    const cells = this.rows.length * this.epochs.length;
    const stride = codes.length / cells;
    return Float32Array.from({ length: cells }, (_, cell) => {
      const row = Math.floor(cell / this.epochs.length);
      return decodeValue(this.factors[row], codes[cell * stride + (sample % page)]);
    });
  }

  /**
   * Summaries of the selected samples and of the rest, for one row.
   * @param row a row, or TOTAL
   * @returns {selected, rest}, each {mean, low, high [epochs], layers [rows][epochs]}
   */
  compare(selection, row) {
    if (!this.ofAll.has(row)) this.ofAll.set(row, this.accumulate(everything(selection.mask.length), row));
    const all = this.ofAll.get(row);
    const isLarge = selection.count > selection.mask.length / 2;
    const part = this.accumulate(isLarge ? selection.invert().indices : selection.indices, row);
    const others = subtract(all, part);
    const [selected, rest] = isLarge ? [others, part] : [part, others];
    return { selected: this.summarise(selected), rest: this.summarise(rest) };
  }

  accumulate(samples, row) {
    const { length: epochs } = this.epochs;
    const rows = row === this.nll ? [row] : this.layers;
    const cells = this.rows.length * epochs;
    const sums = new Float64Array(cells);
    const measured = new Uint32Array(cells);
    const total = new Float64Array(epochs);
    const counts = new Uint32Array(epochs);
    const histogram = new Uint32Array(epochs * BINS);
    const values = new Float32Array(this.manifest.page);
    for (const { codes, places } of this.byPage(samples)) {
      const stride = codes.length / cells;
      for (let epoch = 0; epoch < epochs; epoch++) {
        values.fill(0, 0, places.length);
        for (const r of rows) {
          const cell = r * epochs + epoch;
          const isShown = row === TOTAL || row === r;
          const [sum, count] = addRow(codes, cell * stride, places, this.factors[r], isShown ? values : null);
          sums[cell] += sum;
          measured[cell] += count;
        }
        const [sum, count] = countBins(values.subarray(0, places.length), histogram, epoch * BINS);
        total[epoch] += sum;
        counts[epoch] += count;
      }
    }
    return { sums, measured, total, counts, histogram };
  }

  /** Positions within each page of ascending samples. */
  *byPage(samples) {
    const { page } = this.manifest;
    let start = 0;
    for (let p = 0; p < this.pages.length; p++) {
      let end = start;
      while (end < samples.length && samples[end] < (p + 1) * page) end++;
      if (end > start) {
        yield { codes: this.pages[p], places: samples.subarray(start, end).map((i) => i - p * page) };
      }
      start = end;
    }
  }

  summarise({ sums, measured, total, counts, histogram }) {
    const epochs = this.epochs.length;
    const mean = Array.from(total, (sum, epoch) => (counts[epoch] ? sum / counts[epoch] : NaN));
    const quantile = (share) =>
      Array.from(counts, (count, epoch) => {
        if (!count) return NaN;
        let left = share * count;
        const first = epoch * BINS;
        let bin = 0;
        while (bin < BINS - 1 && (left -= histogram[first + bin]) > 0) bin++;
        bits[0] = bin ? (bin << BIN_SHIFT) | (1 << (BIN_SHIFT - 1)) : 0;
        return float[0];
      });
    const layers = this.layers.map((r) =>
      Array.from(counts, (_, epoch) => sums[r * epochs + epoch] / measured[r * epochs + epoch]),
    );
    return { mean, low: quantile(0.1), high: quantile(0.9), layers };
  }
}

/** Add the values of some places of a row to `values`, unless that is null. Returns sum and number of the finite ones. */
function addRow(codes, start, places, factors, values) {
  let [sum, count] = [0, 0];
  for (let p = 0; p < places.length; p++) {
    const value = decodeValue(factors, codes[start + places[p]]);
    if (values) values[p] += value;
    if (!(value < Infinity)) continue; // not measured, or infinite
    sum += value;
    count++;
  }
  return [sum, count];
}

/** Count values by bins of 3 %. Returns the sum and number of those that were measured. */
function countBins(values, histogram, first) {
  const patterns = new Uint32Array(values.buffer, 0, values.length);
  let [sum, count] = [0, 0];
  for (let p = 0; p < values.length; p++) {
    if (!(values[p] < Infinity)) continue;
    sum += values[p];
    count++;
    histogram[first + (patterns[p] >>> BIN_SHIFT)]++;
  }
  return [sum, count];
}

function everything(size) {
  return Int32Array.from({ length: size }, (_, i) => i);
}

function subtract(all, part) {
  return Object.fromEntries(Object.keys(all).map((key) => [key, subtractArray(all[key], part[key])]));
}

function subtractArray(all, part) {
  const difference = all.slice();
  for (let i = 0; i < part.length; i++) difference[i] -= part[i];
  return difference;
}

export { TOTAL };
