// A scatter of samples: axes, pan and zoom, and the gestures that select (lasso, rectangle, click).
//
// A lasso is a polygon in data units. A sample is selected if the even-odd rule puts it inside, in float64; on a logarithmic
// axis the edges are straight in the logarithm, as they are drawn.

import { polygonContains } from "d3-polygon";
import { axisLabel, axisTicks, extentOf, layOut, toPosition, toValue } from "./axes.js";
import { element } from "./dom.js";
import { createPainter } from "./painters.js";

const LEFT = 66;
const BOTTOM = 40;
const LASSO_STEP = 3; // pixels between two vertices of a lasso
const PICK_RADIUS = 10; // pixels
const MAX_ZOOM = 500;

export class Scatter {
  /**
   * @param root element that the scatter fills
   * @param on {select(indices, mode | null, step), pick(sample, event), hover(sample | -1, event), view()}
   * @param tool function that returns "pan", "lasso" or "rectangle"
   */
  constructor(root, on, tool) {
    Object.assign(this, { root, on, tool });
    this.canvas = element("canvas", { class: "points", "aria-hidden": "true" });
    this.overlay = element("svg:svg", { class: "overlay", role: "img" });
    root.replaceChildren(this.canvas, this.overlay);
    this.view = { scale: 1, shiftX: 0, shiftY: 0 };
    this.measure();
    this.painter = createPainter(this.canvas);
    this.listen();
    this.observer = new ResizeObserver(() => this.resize());
    this.observer.observe(root);
  }

  close() {
    this.observer.disconnect();
    this.painter.destroy();
  }

  measure() {
    this.width = Math.max(50, this.root.clientWidth - LEFT - 8);
    this.height = Math.max(50, this.root.clientHeight - BOTTOM - 8);
    Object.assign(this.canvas.style, {
      left: `${LEFT}px`,
      top: "8px",
      width: `${this.width}px`,
      height: `${this.height}px`,
    });
  }

  resize() {
    const before = [this.width, this.height];
    this.measure();
    if (before[0] === this.width && before[1] === this.height) return;
    this.painter.resize(this.width, this.height);
    this.drawAxes();
  }

  /**
   * @param x, y {column, values, scale}; @param colours step of each sample on the palette
   * @param grey colour of samples that are not selected
   */
  setData({ x, y, colours, palette, grey }) {
    Object.assign(this, { x, y });
    this.u = layOut(x.values, x.scale);
    this.v = layOut(y.values, y.scale);
    this.extents = [extentOf(this.u), extentOf(this.v)];
    const count = this.u.length;
    this.drawnOf = new Int32Array(count).fill(-1);
    this.samples = new Int32Array(count);
    let drawn = 0;
    for (let i = 0; i < count; i++) {
      if (Number.isNaN(this.u[i] + this.v[i])) continue;
      this.drawnOf[i] = drawn;
      this.samples[drawn++] = i;
    }
    this.samples = this.samples.subarray(0, drawn);
    const normalised = (positions, [low, high]) =>
      Float32Array.from(this.samples, (i) => (2 * (positions[i] - low)) / (high - low) - 1);
    const painted = this.painter.setPoints(
      normalised(this.u, this.extents[0]),
      normalised(this.v, this.extents[1]),
      Uint8Array.from(this.samples, (i) => colours[i]),
      palette,
      grey,
    );
    this.painter.setView(this.view);
    const missing = count - drawn;
    this.overlay.setAttribute(
      "aria-label",
      `${axisLabel(y.column)} against ${axisLabel(x.column)}, ${drawn} samples`,
    );
    this.note = missing ? `${missing.toLocaleString("en-US")} not shown: zero or not measured` : "";
    this.drawAxes();
    return painted;
  }

  setSelection(selection) {
    if (!selection.count) return this.painter.select(null);
    const points = new Int32Array(selection.count);
    let count = 0;
    for (const i of selection.indices) {
      if (this.drawnOf[i] >= 0) points[count++] = this.drawnOf[i];
    }
    return this.painter.select(points.subarray(0, count));
  }

  setView(view) {
    this.view = view;
    this.painter.setView(view);
    this.drawAxes();
  }

  resetView() {
    this.setView({ scale: 1, shiftX: 0, shiftY: 0 });
  }

  /** Mark one sample with a ring. */
  mark(sample) {
    this.marked = sample;
    this.drawMark();
  }

  // Coordinates: pixels of the plot area <-> positions u, v.

  toPositions(px, py) {
    const { scale, shiftX, shiftY } = this.view;
    const [[x0, x1], [y0, y1]] = this.extents;
    const nx = ((2 * px) / this.width - 1 - shiftX) / scale;
    const ny = (1 - (2 * py) / this.height - shiftY) / scale;
    return [x0 + ((nx + 1) / 2) * (x1 - x0), y0 + ((ny + 1) / 2) * (y1 - y0)];
  }

  toPixels(u, v) {
    const { scale, shiftX, shiftY } = this.view;
    const [[x0, x1], [y0, y1]] = this.extents;
    const nx = (2 * (u - x0)) / (x1 - x0) - 1;
    const ny = (2 * (v - y0)) / (y1 - y0) - 1;
    return [((scale * nx + shiftX + 1) / 2) * this.width, ((1 - scale * ny - shiftY) / 2) * this.height];
  }

  // Gestures.

  listen() {
    const { overlay } = this;
    overlay.addEventListener("pointerdown", (event) => this.start(event));
    overlay.addEventListener("pointermove", (event) => this.move(event));
    overlay.addEventListener("pointerup", (event) => this.end(event));
    overlay.addEventListener("pointercancel", () => this.cancel());
    overlay.addEventListener("pointerleave", (event) => this.on.hover(-1, event));
    overlay.addEventListener("dblclick", () => {
      this.resetView();
      this.on.view();
    });
    overlay.addEventListener("wheel", (event) => this.zoom(event), { passive: false });
  }

  place(event) {
    const box = this.overlay.getBoundingClientRect();
    return [event.clientX - box.left - LEFT, event.clientY - box.top - 8];
  }

  start(event) {
    if (event.button !== 0 || !this.x) return;
    const place = this.place(event);
    const tool = event.shiftKey ? "lasso" : this.tool();
    this.gesture = { tool, path: [place], from: place, view: this.view, moved: false };
    this.overlay.setPointerCapture(event.pointerId);
    event.preventDefault(); // no selection of text
  }

  move(event) {
    const place = this.place(event);
    const { gesture } = this;
    if (!gesture) {
      if (this.x) this.on.hover(this.nearest(place), event);
      return;
    }
    const [dx, dy] = [place[0] - gesture.from[0], place[1] - gesture.from[1]];
    gesture.moved ||= Math.hypot(dx, dy) >= LASSO_STEP;
    if (!gesture.moved) return;
    if (gesture.tool === "pan") {
      const { scale, shiftX, shiftY } = gesture.view;
      this.setView({
        scale,
        shiftX: shiftX + (2 * dx) / this.width,
        shiftY: shiftY - (2 * dy) / this.height,
      });
      return;
    }
    if (gesture.tool === "lasso") {
      const last = gesture.path.at(-1);
      if (Math.hypot(place[0] - last[0], place[1] - last[1]) >= LASSO_STEP) gesture.path.push(place);
    } else {
      const [[x0, y0], [x1, y1]] = [gesture.from, place];
      gesture.path = [[x0, y0], [x1, y0], [x1, y1], [x0, y1]];
    }
    this.drawLasso(gesture.path);
  }

  end(event) {
    const { gesture } = this;
    this.cancel();
    if (!gesture) return;
    const mode = event.ctrlKey || event.metaKey ? "add" : event.altKey ? "remove" : null;
    if (!gesture.moved) {
      const sample = this.nearest(gesture.from);
      if (sample >= 0) this.on.pick(sample, mode);
    } else if (gesture.tool === "pan") {
      this.on.view();
    } else if (gesture.path.length > 2) {
      this.select(gesture, mode);
    }
  }

  cancel() {
    this.gesture = null;
    this.drawLasso(null);
  }

  select(gesture, mode) {
    performance.mark("lasso");
    const { x, y } = this;
    const polygon = gesture.path.map(([px, py]) => {
      const [u, v] = this.toPositions(px, py);
      return [toValue(u, x.scale), toValue(v, y.scale)];
    });
    this.on.select(this.inside(polygon), mode, {
      tool: gesture.tool,
      x: { column: x.column.name, scale: x.scale },
      y: { column: y.column.name, scale: y.scale },
      polygon,
    });
  }

  /** Samples inside a polygon in data units, by the even-odd rule. */
  inside(polygon) {
    const corners = polygon.map(([x, y]) => [toPosition(x, this.x.scale), toPosition(y, this.y.scale)]);
    const [left, right] = minMax(corners.map(([u]) => u));
    const [low, high] = minMax(corners.map(([, v]) => v));
    return this.samples.filter((i) => {
      const [u, v] = [this.u[i], this.v[i]];
      if (u < left || u > right || v < low || v > high) return false;
      return polygonContains(corners, [u, v]);
    });
  }

  /** The sample nearest to a place within the radius, or -1. */
  nearest([px, py]) {
    let [best, distance] = [-1, PICK_RADIUS ** 2];
    const [u, v] = this.toPositions(px, py);
    const [du, dv] = this.toPositions(px + 1, py - 1).map((end, k) => end - [u, v][k]);
    for (const i of this.samples) {
      const squared = ((this.u[i] - u) / du) ** 2 + ((this.v[i] - v) / dv) ** 2;
      if (squared < distance) [best, distance] = [i, squared];
    }
    return best;
  }

  zoom(event) {
    if (!this.x) return;
    event.preventDefault();
    const [px, py] = this.place(event);
    this.zoomBy(Math.exp(-event.deltaY * 0.002), px, py);
  }

  /** Zoom about a place of the plot area; by default its centre. */
  zoomBy(factor, px = this.width / 2, py = this.height / 2) {
    const { scale, shiftX, shiftY } = this.view;
    const next = Math.min(MAX_ZOOM, Math.max(0.5, scale * factor));
    const [nx, ny] = [(2 * px) / this.width - 1, 1 - (2 * py) / this.height];
    this.setView({
      scale: next,
      shiftX: nx - ((nx - shiftX) * next) / scale,
      shiftY: ny - ((ny - shiftY) * next) / scale,
    });
    this.on.view();
  }

  // Drawing above the points.

  drawAxes() {
    if (!this.x) return;
    const { width, height } = this;
    const [u0, v0] = this.toPositions(0, height);
    const [u1, v1] = this.toPositions(width, 0);
    const group = element("svg:g", { transform: `translate(${LEFT},8)` });
    group.append(element("svg:rect", { class: "frame", width, height, fill: "none" }));
    for (const [u, text] of axisTicks([u0, u1], this.x.scale, width / 90)) {
      const [px] = this.toPixels(u, v0);
      group.append(
        element("svg:line", { class: "tick", x1: px, x2: px, y1: height, y2: height + 4 }),
        element("svg:text", { x: px, y: height + 16, "text-anchor": "middle" }, text),
      );
    }
    for (const [v, text] of axisTicks([v0, v1], this.y.scale, height / 60)) {
      const [, py] = this.toPixels(u0, v);
      group.append(
        element("svg:line", { class: "tick", x1: -4, x2: 0, y1: py, y2: py }),
        element("svg:text", { x: -7, y: py + 4, "text-anchor": "end" }, text),
      );
    }
    group.append(
      element("svg:text", { class: "axis", x: width / 2, y: height + 33, "text-anchor": "middle" }, axisLabel(this.x.column)),
      element(
        "svg:text",
        { class: "axis", transform: `translate(${-LEFT + 12},${height / 2}) rotate(-90)`, "text-anchor": "middle" },
        axisLabel(this.y.column),
      ),
      element("svg:text", { class: "note", x: width - 5, y: 14, "text-anchor": "end" }, this.note),
    );
    this.lasso = element("svg:path", { class: "lasso" });
    this.ring = element("svg:circle", { class: "ring", r: 7 });
    group.append(this.lasso, this.ring);
    this.overlay.replaceChildren(group);
    this.drawMark();
  }

  drawMark() {
    if (!this.ring) return;
    const place = this.marked >= 0 ? this.toPixels(this.u[this.marked], this.v[this.marked]) : [NaN, NaN];
    const isInside = place[0] >= 0 && place[0] <= this.width && place[1] >= 0 && place[1] <= this.height;
    this.ring.setAttribute("visibility", isInside ? "visible" : "hidden");
    if (isInside) {
      this.ring.setAttribute("cx", place[0]);
      this.ring.setAttribute("cy", place[1]);
    }
  }

  drawLasso(path) {
    this.lasso?.setAttribute("d", path ? `M${path.map((place) => place.join(",")).join("L")}Z` : "");
  }
}

const minMax = (values) => [Math.min(...values), Math.max(...values)];
