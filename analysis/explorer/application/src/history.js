// Histories of a run: importance by layer and epoch, and NLL by epoch, of every sample.
//
// Values are stored as codes of 16 bits on a logarithmic scale by row (a layer, or the NLL), within 0.1 %. In memory the codes
// of a sample lie together: a selection reads its own samples alone. Of a set with more than half of the samples, the others
// are summed and subtracted from the sums of all.

const BIN_SHIFT = 18; // of the bits of a float32: bins of 3 %
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
    this.cells = this.rows.length * this.epochs.length;
    this.loading = []; // page -> promise
    this.pages = []; // page -> codes [sample, row, epoch]
    this.ofAll = new Map(); // row -> summary of all samples
  }

  /** Load every page. */
  async load() {
    for (let page = 0; page < this.manifest.files.length; page++) await this.loadPage(page);
    this.isLoaded = true;
  }

  loadPage(page) {
    this.loading[page] ??= this.node.loadCodes(this.manifest.files[page]).then((codes) => (this.pages[page] = bySample(codes, this.cells)));
    return this.loading[page];
  }

  /** Values of one sample, Float32Array [rows * epochs]. */
  async sample(sample) {
    const { page } = this.manifest;
    const start = (sample % page) * this.cells;
    const codes = (await this.loadPage(Math.floor(sample / page))).subarray(start, start + this.cells);
    return Float32Array.from(codes, (code, cell) => decodeValue(this.factors[Math.floor(cell / this.epochs.length)], code));
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
    const bins = this.binsOf(row);
    return { selected: this.summarise(selected, bins), rest: this.summarise(rest, bins) };
  }

  /** The bins that the values of a row can fall into: {first, count}. Bin 0 has zero and all below the first. */
  binsOf(row) {
    const rows = row === TOTAL ? this.layers.map((r) => this.rows[r]) : [this.rows[row]];
    const ends = [Math.min(...rows.map(({ low }) => Math.exp(low))), rows.reduce((sum, { high }) => sum + Math.exp(high), 0)];
    const [first, last] = ends.map((value) => binOf(Math.min(value, LARGEST)));
    return { first: Math.max(0, first - 2), count: last - first + 5 }; // codes and float32 round
  }

  accumulate(samples, row) {
    const { cells, factors } = this;
    const { length: epochs } = this.epochs;
    const { page } = this.manifest;
    const rows = row === this.nll ? [row] : this.layers;
    const bins = this.binsOf(row);
    const sums = new Float64Array(cells);
    const missing = new Uint32Array(cells);
    const total = new Float64Array(epochs);
    const totalMissing = new Uint32Array(epochs);
    const histogram = new Uint32Array(epochs * bins.count);
    const values = new Float32Array(epochs);
    const patterns = new Uint32Array(values.buffer);
    for (let k = 0; k < samples.length; k++) {
      const codes = this.pages[Math.floor(samples[k] / page)];
      const start = (samples[k] % page) * cells;
      values.fill(0);
      for (const r of rows) {
        addRow(codes, start, r * epochs, factors[r], sums, missing, row === TOTAL || row === r ? values : null, epochs);
      }
      countBins(values, patterns, bins, histogram, total, totalMissing);
    }
    const measured = (lost) => lost.map((count) => samples.length - count);
    return { sums, measured: measured(missing), total, counts: measured(totalMissing), histogram };
  }

  summarise({ sums, measured, total, counts, histogram }, bins) {
    const epochs = this.epochs.length;
    const mean = Array.from(total, (sum, epoch) => (counts[epoch] ? sum / counts[epoch] : NaN));
    const quantile = (share) =>
      Array.from(counts, (count, epoch) => {
        if (!count) return NaN;
        let left = share * count;
        const start = epoch * bins.count;
        let bin = 0;
        while (bin < bins.count - 1 && (left -= histogram[start + bin]) > 0) bin++;
        bits[0] = bin ? ((bins.first + bin) << BIN_SHIFT) | (1 << (BIN_SHIFT - 1)) : 0;
        return float[0];
      });
    const layers = this.layers.map((r) =>
      Array.from(counts, (_, epoch) => sums[r * epochs + epoch] / measured[r * epochs + epoch]),
    );
    return { mean, low: quantile(0.1), high: quantile(0.9), layers };
  }
}

const LARGEST = 3.4028234663852886e38; // of float32

function binOf(value) {
  float[0] = value;
  return bits[0] >>> BIN_SHIFT;
}

/** Codes [cell, sample] as [sample, cell]. */
function bySample(codes, cells) {
  const samples = codes.length / cells;
  const turned = new Uint16Array(codes.length);
  for (let cell = 0; cell < cells; cell++) {
    for (let k = 0; k < samples; k++) turned[k * cells + cell] = codes[cell * samples + k];
  }
  return turned;
}

/** Add a sample's row, from its first cell on, to the sums of the cells, and to `values` unless that is null. */
function addRow(codes, start, first, { high, low }, sums, missing, values, epochs) {
  for (let epoch = 0; epoch < epochs; epoch++) {
    const cell = first + epoch;
    const code = codes[start + cell];
    if (code > ZERO && code < INFINITE) {
      const value = high[code >> 8] * low[code & 255];
      if (values) values[epoch] += value;
      sums[cell] += value;
    } else if (code !== ZERO) {
      missing[cell]++; // not measured, or infinite
      if (values) values[epoch] = NaN;
    }
  }
}

/** Count a sample's values by bins of 3 %, and add them to the totals. @param patterns the bits of the values */
function countBins(values, patterns, { first, count }, histogram, total, missing) {
  for (let epoch = 0; epoch < values.length; epoch++) {
    if (!(values[epoch] < Infinity)) {
      missing[epoch]++;
      continue;
    }
    total[epoch] += values[epoch];
    histogram[epoch * count + Math.max(0, (patterns[epoch] >>> BIN_SHIFT) - first)]++;
  }
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
