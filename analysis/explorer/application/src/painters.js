// The adapter between the scatters and what draws their points.
//
// A painter draws points at positions in [-1, 1] under a view (x -> scale * x + shift), in the colours of a palette; with a
// selection, all other points are grey. `WebglPainter` uses regl-scatterplot, `CanvasPainter` a 2-D canvas where there is no
// WebGL. Gestures and axes are in scatter.js, so that both behave alike.

import createScatterplot, { createRenderer } from "regl-scatterplot";

/** Create a painter on a canvas. */
export function createPainter(canvas) {
  return sharedRenderer()?.isSupported ? new WebglPainter(canvas) : new CanvasPainter(canvas);
}

let renderer;

/** One WebGL context for all scatters, or null where there is none. */
function sharedRenderer() {
  if (renderer === undefined) {
    try {
      const hasWebgl = Boolean(document.createElement("canvas").getContext("webgl"));
      renderer = hasWebgl ? createRenderer() : null;
    } catch {
      renderer = null;
    }
  }
  return renderer;
}

/** Radius of a point in CSS pixels: smaller where there are many. */
const pointSize = (count) => (count > 20_000 ? 2.5 : count > 3_000 ? 3.5 : 5);

class WebglPainter {
  constructor(canvas) {
    this.plot = createScatterplot({
      canvas,
      renderer,
      width: canvas.clientWidth,
      height: canvas.clientHeight,
      aspectRatio: canvas.clientWidth / canvas.clientHeight,
      cameraIsFixed: true,
      actionKeyMap: {},
      colorBy: "valueA",
      opacity: 0.75,
      opacityInactiveScale: 1,
      opacityInactiveMax: 1,
      pointScaleMode: "constant",
      pointOutlineWidth: 0,
      pointSizeSelected: 0,
    });
    this.drawing = Promise.resolve();
  }

  resize(width, height) {
    this.plot.set({ width, height, aspectRatio: width / height });
  }

  /** @param colours step of each point on the palette. */
  setPoints(x, y, colours, palette, grey) {
    this.palette = palette;
    this.grey = grey;
    this.isGrey = false;
    this.plot.deselect({ preventEvent: true });
    this.plot.set({
      pointColor: palette,
      pointColorActive: palette,
      pointColorHover: palette,
      pointSize: pointSize(x.length),
    });
    this.drawing = this.drawing.then(() =>
      this.plot.draw({ x, y, valueA: colours }, { zDataType: "categorical" }),
    );
    return this.drawing;
  }

  /** @param points Int32Array of selected points, or null: all in colour. */
  select(points) {
    const isGrey = points !== null;
    if (isGrey !== this.isGrey) {
      this.isGrey = isGrey;
      this.plot.set({ pointColor: isGrey ? this.palette.map(() => this.grey) : this.palette });
    }
    this.drawing = this.drawing.then(() => {
      if (points?.length) this.plot.select(Array.from(points), { preventEvent: true });
      else this.plot.deselect({ preventEvent: true });
    });
    return this.drawing;
  }

  setView({ scale, shiftX, shiftY }) {
    const view = new Float32Array([scale, 0, 0, 0, 0, scale, 0, 0, 0, 0, 1, 0, shiftX, shiftY, 0, 1]);
    this.plot.set({ cameraView: view });
  }

  destroy() {
    this.plot.destroy();
  }
}

class CanvasPainter {
  constructor(canvas) {
    this.canvas = canvas;
    this.view = { scale: 1, shiftX: 0, shiftY: 0 };
    this.resize(canvas.clientWidth, canvas.clientHeight);
  }

  resize(width, height) {
    const ratio = window.devicePixelRatio || 1;
    Object.assign(this, { width, height });
    this.canvas.width = width * ratio;
    this.canvas.height = height * ratio;
    this.canvas.getContext("2d").setTransform(ratio, 0, 0, ratio, 0, 0);
    this.paint();
  }

  setPoints(x, y, colours, palette, grey) {
    Object.assign(this, { x, y, colours, palette, grey, selected: null });
    return this.repaint();
  }

  select(points) {
    this.selected = points;
    return this.repaint();
  }

  setView(view) {
    this.view = view;
    this.repaint();
  }

  /** Paint once in the next frame, after all changes of this one. */
  repaint() {
    this.frame ??= new Promise((resolve) =>
      requestAnimationFrame(() => {
        this.frame = null;
        this.paint();
        resolve();
      }),
    );
    return this.frame;
  }

  paint() {
    if (!this.x) return;
    const context = this.canvas.getContext("2d");
    context.clearRect(0, 0, this.width, this.height);
    context.globalAlpha = 0.75;
    const all = this.x.keys();
    if (this.selected) this.paintPoints(context, all, () => this.grey);
    this.paintPoints(context, this.selected ?? all, (i) => this.palette[this.colours[i]]);
  }

  paintPoints(context, points, colourOf) {
    const { scale, shiftX, shiftY } = this.view;
    const size = pointSize(this.x.length);
    const byColour = new Map();
    for (const i of points) {
      const colour = colourOf(i);
      if (!byColour.has(colour)) byColour.set(colour, []);
      byColour.get(colour).push(i);
    }
    for (const [colour, group] of byColour) {
      context.fillStyle = colour;
      for (const i of group) {
        const left = ((scale * this.x[i] + shiftX + 1) / 2) * this.width;
        const top = ((1 - scale * this.y[i] - shiftY) / 2) * this.height;
        context.fillRect(left - size / 2, top - size / 2, size, size);
      }
    }
  }

  destroy() {}
}
