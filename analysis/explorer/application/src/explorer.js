// One data set on the page: its views, and what happens when the state changes.

import { classPalette, sequencePalette, sequenceSteps, themeColour } from "./colours.js";
import { RunComparison } from "./compare.js";
import { SampleDetail } from "./detail.js";
import { element } from "./dom.js";
import { EXPORTS, toSnippet } from "./exports.js";
import { ClassChips, RangeFilter } from "./filters.js";
import { History } from "./history.js";
import { HistoryPanel } from "./history_panel.js";
import { Pickers } from "./pickers.js";
import { Scatter } from "./scatter.js";
import { Selection } from "./selection.js";
import { decodeState, encodeState } from "./state.js";
import { SampleTable } from "./table.js";
import { ThumbnailGrid } from "./thumbnails.js";
import { SampleTip } from "./tip.js";
import { everySample, NamedSelections, Toolbar } from "./toolbar.js";

const UNDO_STEPS = 50;
const URL_DELAY = 150; // milliseconds between a change and the URL
const by = (id) => document.getElementById(id);

export class Explorer {
  /** @param node loaded NodeData; @param text fragment of the URL; @param fail shows a message */
  constructor(study, node, text, fail) {
    Object.assign(this, { study, node, fail, undone: [] });
    this.state = decodeState(node, text);
    this.histories = new Map();
    this.build();
  }

  /** Load what the state needs and draw everything; resolves once the page reacts. */
  async open() {
    await this.loadRuns();
    if (this.state.sample < 0) this.state.sample = this.sorted()[0];
    this.fillPickers();
    this.chips.setData(this.node);
    await this.showRun();
    this.loadHistory();
  }

  async loadRuns() {
    for (const run of new Set([this.state.run, ...this.state.compare.runs])) await this.node.loadRun(run);
  }

  build() {
    const { state } = this;
    this.pickers = this.createPickers();
    this.tip = new SampleTip(by("tip"));
    const select = (samples, mode, step) => this.select(samples, mode ?? this.state.mode, step);
    const gestures = (onView) => ({
      select,
      pick: (sample, mode) => this.pick(sample, mode ?? this.state.mode),
      hover: (sample, event) => this.tip.show(this.node, sample, event),
      view: onView,
    });
    const tool = () => this.state.tool;
    this.scatters = state.plots.map((plot, k) => {
      const scatter = new Scatter(by(`scatter-${k}`), gestures(() => this.keepView(k)), tool);
      if (plot.view) scatter.view = plot.view;
      return scatter;
    });
    this.toolbar = new Toolbar(by("tools"), {
      tool: (key) => this.change({ tool: key }),
      mode: (key) => this.change({ mode: key }),
      clear: () => this.setSelection(Selection.none(this.node.count)),
      all: () => this.setSelection(everySample(this.node.count)),
      invert: () => this.setSelection(this.state.selection.invert()),
      undo: () => this.undo(),
      reset: () => this.resetViews(),
    });
    this.chips = new ClassChips(by("classes"), (samples, step) => select(samples, null, step));
    this.grid = new ThumbnailGrid(by("grid"), (sample) => this.show(sample));
    this.detail = new SampleDetail(by("sample"), (target) => this.change({ target }));
    this.historyPanel = new HistoryPanel((row) => this.change({ row }));
    this.ranges = state.ranges.map(
      (_, k) =>
        new RangeFilter({
          select: (samples, step) => select(samples, null, step),
          column: (name) => {
            this.state.ranges[k] = name;
            this.showRange(k);
            this.keepUrl();
          },
        }),
    );
    by("ranges").replaceChildren(...this.ranges.map((range) => range.node));
    this.comparison = new RunComparison(by("compare"), gestures(() => {}), tool);
    this.table = new SampleTable(by("table"), {
      sort: (name) => this.sortBy(name),
      toggle: (sample) => this.select([sample], this.state.selection.mask[sample] ? "remove" : "add", { tool: "row", sample: this.node.id(sample) }),
      pick: (sample) => this.show(sample),
    });
    this.named = new NamedSelections(by("named"), {
      save: (name) => this.changeNamed((named) => named.set(name, this.state.selection)),
      drop: (name) => this.changeNamed((named) => named.delete(name)),
      use: (name, mode) => select(this.state.named.get(name).indices, mode, { tool: "named", name }),
    });
    by("exports").replaceChildren(
      ...Object.entries(EXPORTS).map(([name, save]) => element("button", { type: "button", onclick: () => save(this.context()) }, name)),
      element("button", { type: "button", onclick: () => this.copyUrl() }, "Copy link"),
    );
  }

  context() {
    return { study: this.study, node: this.node, runId: this.state.run, selection: this.state.selection };
  }

  fillPickers() {
    this.pickers.fill(this.node, this.state, this.ranges);
  }

  createPickers() {
    const plotOf = (k) => this.state.plots[k];
    return new Pickers({
      run: (id) => this.changeRun(id),
      colour: (name) => {
        this.state.colour = name;
        this.showPlots();
      },
      axis: (k, end, name) => {
        plotOf(k)[end] = name;
        plotOf(k).linear = plotOf(k).linear.replace(end, "");
        this.resetView(k);
        this.fillPickers();
        this.showPlots();
      },
      scale: (k, end, isLog) => {
        const { linear } = plotOf(k);
        plotOf(k).linear = ["x", "y"].filter((each) => (each === end ? !isLog : linear.includes(each))).join("");
        this.resetView(k);
        this.showPlots();
      },
      sort: (parts) => this.change({ sort: { ...this.state.sort, ...parts } }),
      compare: (change) => this.changeComparison(change),
    });
  }

  // Drawing.

  async showRun() {
    this.ranges.forEach((_, k) => this.showRange(k));
    this.showHistoryPicker();
    await this.showPlots();
  }

  colours() {
    const { node, state } = this;
    const grey = themeColour("--grey");
    if (state.colour === "class") {
      const palette = classPalette(node.manifest.classes.slice(0, 250));
      return { colours: Uint8Array.from(node.labels, (label) => label % palette.length), palette, grey };
    }
    const steps = sequenceSteps(node.order(state.run, state.colour), node.values(state.run, state.colour));
    return { colours: steps, palette: sequencePalette(), grey };
  }

  async showPlots() {
    const { node, state } = this;
    const colours = this.colours();
    const axis = (plot, end) => {
      const column = node.column(state.run, plot[end]);
      return { column, values: node.values(state.run, plot[end]), scale: plot.linear.includes(end) ? "linear" : column.scale };
    };
    const painted = this.scatters.map((scatter, k) =>
      scatter.setData({ x: axis(state.plots[k], "x"), y: axis(state.plots[k], "y"), ...colours }),
    );
    const [a, b] = state.compare.runs;
    const name = node.column(a, state.compare.column) && node.column(b, state.compare.column) ? state.compare.column : "importance";
    painted.push(this.comparison.setData({ node, column: node.column(a, name), runs: [a, b], ...colours }));
    await Promise.all([...painted, this.showSelection()]);
  }

  /** Draw what depends on the selection; resolves once the plots, images and history are drawn. */
  async showSelection() {
    const { state, scatters } = this;
    const painted = scatters.map((scatter) => scatter.setSelection(state.selection));
    scatters.forEach((scatter) => scatter.mark(state.sample));
    this.showTools();
    this.showSamples();
    this.showHistory();
    await Promise.all(painted);
    this.keepUrl();
    // The plots were drawn in this frame, which is painted before the next task.
    const { selection } = state;
    setTimeout(() => {
      if (performance.getEntriesByName("lasso").length) {
        performance.measure("lasso to paint", "lasso");
        performance.clearMarks("lasso");
      }
      if (this.state.selection === selection) this.showLater();
    });
  }

  /** Draw what is below the first screen, after the frame with the selection is painted. */
  showLater() {
    const { state } = this;
    this.ranges.forEach((range) => range.setSelection(state.selection));
    this.comparison.setSelection(state.selection, state.sample);
    this.showTable();
    this.named.show(state.named);
    by("snippet").textContent = toSnippet(this.context());
    this.showDetail();
  }

  showTools() {
    const { tool, mode, selection } = this.state;
    this.toolbar.show({ tool, mode, selection, canUndo: this.undone.length > 0 });
  }

  /** Samples of the selection, or all, in the chosen order. */
  sorted() {
    const { node, state } = this;
    const order = node.order(state.run, state.sort.name);
    const values = node.values(state.run, state.sort.name);
    const { mask, count } = state.selection;
    const samples = new Int32Array(count || order.length);
    let size = 0;
    const put = (i) => {
      if (!count || mask[i]) samples[size++] = i;
    };
    let measured = order.length; // NaN is last, in both directions
    while (measured && Number.isNaN(values[order[measured - 1]])) measured--;
    if (state.sort.descending) for (let k = measured - 1; k >= 0; k--) put(order[k]);
    else for (let k = 0; k < measured; k++) put(order[k]);
    for (let k = measured; k < order.length; k++) put(order[k]);
    return samples;
  }

  showSamples() {
    const { node, state } = this;
    this.order = this.sorted();
    this.grid.show(node, this.order, state.sample);
  }

  showTable() {
    const { node, state, order } = this;
    this.table.show({ node, runId: state.run, order, columns: node.columns(state.run), sort: state.sort, selection: state.selection });
  }

  showRange(k) {
    const { node, state } = this;
    const name = state.ranges[k];
    this.ranges[k].setData(node.column(state.run, name), node.values(state.run, name), node.order(state.run, name));
    this.ranges[k].setSelection(state.selection);
  }

  get history() {
    return this.histories.get(this.state.run);
  }

  async loadHistory() {
    const manifest = this.node.manifest.histories.find((history) => history.run === this.state.run);
    if (manifest && !this.history) {
      const history = new History(this.node, manifest);
      this.histories.set(manifest.run, history);
      try {
        await history.load();
      } catch (error) {
        this.fail(error.message);
        return;
      }
    }
    this.showHistoryPicker();
    this.showHistory();
    this.showDetail();
    document.documentElement.dataset.history = "ready";
  }

  showHistoryPicker() {
    this.state.row = this.historyPanel.showPicker(this.node, this.history, this.state.row);
  }

  showHistory() {
    this.historyPanel.show(this.node, this.history, this.state.selection, this.state.row);
  }

  showDetail() {
    const { node, state, history } = this;
    this.detail.show(node, state.run, state.sample, history, state.target).catch((error) => this.fail(error.message));
  }

  showInfluence() {
    const { node, state } = this;
    this.detail.influence.show(node, state.run, state.sample, state.target).catch((error) => this.fail(error.message));
  }

  // Changes.

  /** Combine the samples of a tool with the selection. */
  select(samples, mode, step) {
    return this.setSelection(this.state.selection.combine(samples, mode, { ...step, mode }));
  }

  async setSelection(selection) {
    this.undone.push(this.state.selection);
    if (this.undone.length > UNDO_STEPS) this.undone.shift();
    this.state.selection = selection;
    this.chips.release();
    await this.showSelection();
  }

  undo() {
    if (!this.undone.length) return;
    this.state.selection = this.undone.pop();
    this.chips.release();
    this.showSelection();
  }

  pick(sample, mode) {
    this.state.sample = sample;
    this.select([sample], mode, { tool: "click", sample: this.node.id(sample) });
  }

  /** Show one sample in detail; the selection stays. */
  show(sample) {
    this.state.sample = sample;
    this.scatters.forEach((scatter) => scatter.mark(sample));
    this.comparison.setSelection(this.state.selection, sample);
    this.grid.mark(sample);
    this.showDetail();
    this.keepUrl();
  }

  /** Change parts of the state that need neither other columns nor another selection. */
  change(parts) {
    Object.assign(this.state, parts);
    this.showTools();
    if (parts.sort) {
      this.pickers.showOrder(parts.sort);
      this.showSamples();
      this.showTable();
    }
    if (parts.row) this.showHistory();
    if (parts.target) this.showInfluence();
    this.keepUrl();
  }

  sortBy(name) {
    const { sort } = this.state;
    this.change({ sort: { name, descending: sort.name === name ? !sort.descending : true } });
  }

  changeNamed(edit) {
    edit(this.state.named);
    this.named.show(this.state.named);
    this.keepUrl();
  }

  async changeRun(id) {
    try {
      await this.node.loadRun(id);
    } catch (error) {
      this.fail(error.message);
      this.fillPickers();
      return;
    }
    // Columns that the run does not have (influence, subsets) are replaced by their defaults.
    this.state.run = id;
    this.state = { ...decodeState(this.node, encodeState(this.node, this.state)) };
    this.fillPickers();
    await this.showRun();
    this.loadHistory();
  }

  async changeComparison(change) {
    const next = structuredClone(this.state.compare);
    change(next);
    try {
      for (const run of next.runs) await this.node.loadRun(run);
    } catch (error) {
      this.fail(error.message);
      return;
    }
    this.state.compare = next;
    await this.showPlots();
  }

  /** Take over a study that has grown: other runs and columns; the selection stays. */
  async grow(study, manifest) {
    this.study = study;
    this.node.update(manifest);
    if (manifest.shared && manifest.shared.file !== this.node.sharedFile) await this.node.loadShared();
    this.fillPickers();
    this.showHistoryPicker();
    this.loadHistory();
  }

  // Views of the plots, and the URL.

  keepView(k) {
    const { view } = this.scatters[k];
    this.state.plots[k].view = view.scale === 1 && !view.shiftX && !view.shiftY ? null : view;
    this.keepUrl();
  }

  resetView(k) {
    this.scatters[k].resetView();
    this.state.plots[k].view = null;
  }

  resetViews() {
    this.scatters.forEach((_, k) => this.resetView(k));
    this.keepUrl();
  }

  keepUrl() {
    clearTimeout(this.urlTimer);
    this.urlTimer = setTimeout(() => this.writeUrl(), URL_DELAY);
  }

  writeUrl() {
    clearTimeout(this.urlTimer);
    this.text = encodeState(this.node, this.state);
    history.replaceState(null, "", `#${this.text}`);
  }

  async copyUrl() {
    this.writeUrl();
    try {
      await navigator.clipboard.writeText(location.href);
      this.fail("");
    } catch {
      this.fail("The browser did not allow copying; copy the address of this page instead.");
    }
  }

  /** Free the canvases for another data set. */
  close() {
    for (const scatter of [...this.scatters, this.comparison.scatter]) scatter.close();
  }

  /** Draw again in the colours of the present scheme. */
  restyle() {
    this.historyPanel.chart.restyle();
    this.detail.chart.restyle();
    this.showPlots();
  }
}
