// The data of the explorer: classic scripts beside index.html, which a page opened from file:// may load.
//
// Each script calls `sampimpData(object)` once. Arrays are base64 of little-endian bytes; the format is described in
// docs/explore.md.

const received = new Map();

window.sampimpData = (object) => {
  received.set(document.currentScript.dataset.file, object);
};

/** Load a script of data and return its object. Rejects with the name of a file that cannot be read. */
export function loadScript(file, { fresh = false } = {}) {
  return new Promise((resolve, reject) => {
    const script = document.createElement("script");
    script.dataset.file = file;
    script.src = file + (fresh ? `?${Date.now()}` : "");
    script.onload = () => {
      const object = received.get(file);
      received.delete(file);
      script.remove();
      if (object) resolve(object);
      else reject(new Error(`${file} is damaged`));
    };
    script.onerror = () => {
      script.remove();
      reject(new Error(`${file} cannot be read`));
    };
    document.head.append(script);
  });
}

/** Decode base64 into the bytes of a typed array of the given type. */
export function decode(text, ArrayType) {
  const binary = atob(text);
  const bytes = new Uint8Array(binary.length);
  for (let i = 0; i < bytes.length; i++) bytes[i] = binary.charCodeAt(i);
  return new ArrayType(bytes.buffer);
}

const NO_LABEL = 65535;

/** One data set (node of the cube) of a study: its manifest, and its parts once they are loaded. */
export class NodeData {
  constructor(manifest) {
    this.manifest = manifest;
    this.runColumns = new Map(); // run id -> {column name: Float32Array}
    this.pages = new Map(); // file -> promise of its values
    this.orders = new Map(); // column key -> Int32Array, samples by ascending value
  }

  /** Take over the manifest of a study that has grown; loaded parts stay. */
  update(manifest) {
    this.manifest = manifest;
  }

  async load() {
    const { manifest } = this;
    this.labels = decode((await loadScript(manifest.labels.file)).array, Uint16Array);
    this.count = this.labels.length;
    if (manifest.sample_ids) {
      this.ids = decode((await loadScript(manifest.sample_ids.file)).array, Int32Array);
    }
    if (manifest.names) this.names = (await loadScript(manifest.names.file)).values;
    await this.loadShared();
  }

  async loadShared() {
    const { shared } = this.manifest;
    this.shared = shared ? decodeColumns((await loadScript(shared.file)).columns) : {};
    this.sharedFile = shared?.file;
  }

  run(id) {
    return this.manifest.runs.find((run) => run.id === id);
  }

  async loadRun(id) {
    if (!this.runColumns.has(id)) {
      this.runColumns.set(id, decodeColumns((await loadScript(this.run(id).file)).columns));
    }
    return this.runColumns.get(id);
  }

  /** Columns that a run has: its own and those of the study. */
  columns(runId) {
    return [...this.run(runId).columns, ...(this.manifest.shared?.columns ?? [])];
  }

  column(runId, name) {
    return this.columns(runId).find((column) => column.name === name);
  }

  /** Values [N] of a column of a loaded run, float32. */
  values(runId, name) {
    return this.runColumns.get(runId)?.[name] ?? this.shared[name];
  }

  /** Samples in ascending order of a column; NaN last. */
  order(runId, name) {
    const key = this.shared[name] ? name : `${runId}/${name}`;
    if (!this.orders.has(key)) this.orders.set(key, argsort(this.values(runId, name)));
    return this.orders.get(key);
  }

  /** Position of a sample in the training set. */
  id(sample) {
    return this.ids ? this.ids[sample] : sample;
  }

  /** The sample at a position in the training set, or -1. */
  sampleOf(id) {
    if (!this.ids) return Number.isInteger(id) && id >= 0 && id < this.count ? id : -1;
    return this.ids.indexOf(id);
  }

  className(sample) {
    const label = this.labels[sample];
    return label === NO_LABEL ? "no class" : (this.manifest.classes[label] ?? String(label));
  }

  name(sample) {
    return this.names ? this.names[sample] : "";
  }

  /** Load a row of a data set without images: an array of values, or a text. */
  async row(sample) {
    const { page, files } = this.manifest.rows;
    const file = files[Math.floor(sample / page)];
    if (!this.pages.has(file)) this.pages.set(file, loadScript(file).then((part) => part.values));
    return (await this.pages.get(file))[sample % page];
  }

  /** Load the codes in a file of a history, or of influence: [rows, epochs, samples of the page]. */
  async loadCodes(file) {
    return decode((await loadScript(file)).array, Uint16Array);
  }
}

function decodeColumns(columns) {
  return Object.fromEntries(
    Object.entries(columns).map(([name, text]) => [name, decode(text, Float32Array)]),
  );
}

/** Indices that sort values in ascending order, NaN last, equal values by index. */
export function argsort(values) {
  const order = Int32Array.from(values, (_, i) => i);
  const key = (i) => (Number.isNaN(values[i]) ? Infinity : values[i]);
  return order.sort((a, b) => {
    const [p, q] = [key(a), key(b)];
    return p < q ? -1 : p > q ? 1 : a - b;
  });
}

/** Percentile ranks in [0, 100] of an ascending order; NaN stays NaN. */
export function percentileRanks(values, order) {
  const finite = order.filter((i) => !Number.isNaN(values[i])).length;
  const ranks = new Float32Array(values.length).fill(NaN);
  for (let k = 0; k < finite; k++) ranks[order[k]] = finite > 1 ? (100 * k) / (finite - 1) : 50;
  return ranks;
}
