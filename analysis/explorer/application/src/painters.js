// The adapter between the scatters and what draws their points.
//
// A painter draws points at positions in [-1, 1] under a view (x -> scale * x + shift), in the colours of a palette; with a
// selection, all other points are grey. `WebglPainter` uses regl-scatterplot, `CanvasPainter` a 2-D canvas where there is no
// graphics processor. Gestures and axes are in scatter.js, so that both behave alike.

import createScatterplot, { createRenderer } from "regl-scatterplot";
import { rgb } from "./colours.js";

/** Create a painter on a canvas. */
export function createPainter(canvas) {
  return sharedRenderer()?.isSupported ? new WebglPainter(canvas) : new CanvasPainter(canvas);
}

let renderer;

/** One WebGL context for all scatters, or null where there is none. */
function sharedRenderer() {
  if (renderer === undefined) {
    try {
      renderer = hasProcessor() ? createRenderer() : null;
    } catch {
      renderer = null;
    }
  }
  return renderer;
}

/** Radius of a point in CSS pixels: smaller where there are many. */
const pointSize = (count) => (count > 20_000 ? 2.5 : count > 3_000 ? 3.5 : 5);

/** Whether WebGL runs on a graphics processor: in software it is slower than the 2-D canvas. */
function hasProcessor() {
  const context = document.createElement("canvas").getContext("webgl");
  const names = context?.getExtension("WEBGL_debug_renderer_info");
  return Boolean(context) && !(names && SOFTWARE.test(context.getParameter(names.UNMASKED_RENDERER_WEBGL)));
}

const SOFTWARE = /swiftshader|llvmpipe|softpipe|software|basic render/i;

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
    this.ratio = window.devicePixelRatio || 1;
    this.canvas.width = Math.round(width * this.ratio);
    this.canvas.height = Math.round(height * this.ratio);
    this.repaint();
  }

  setPoints(x, y, colours, palette, grey) {
    Object.assign(this, { x, y, colours, selected: null });
    this.palette = Uint32Array.from(palette, pixelOf);
    this.grey = pixelOf(grey);
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

  /** Write the pixels of all points: for 50,000 points ten times as fast as a rectangle each. */
  paint() {
    if (!this.x) return;
    const { width, height } = this.canvas;
    const context = this.canvas.getContext("2d");
    const image = context.createImageData(width, height);
    const pixels = new Uint32Array(image.data.buffer);
    const disc = discOf((pointSize(this.x.length) * this.ratio) / 2);
    const put = (i, colour) => {
      const left = Math.round(((this.view.scale * this.x[i] + this.view.shiftX + 1) / 2) * width);
      const top = Math.round(((1 - this.view.scale * this.y[i] - this.view.shiftY) / 2) * height);
      for (let k = 0; k < disc.length; k += 2) {
        const [column, row] = [left + disc[k], top + disc[k + 1]];
        if (column >= 0 && column < width && row >= 0 && row < height) pixels[row * width + column] = colour;
      }
    };
    const { colours, palette, grey, selected } = this;
    for (let i = 0; i < this.x.length; i++) put(i, selected ? grey : palette[colours[i]]);
    if (selected) for (const i of selected) put(i, palette[colours[i]]);
    context.putImageData(image, 0, 0);
  }

  destroy() {}
}

/** A colour as the four bytes of a pixel, opaque. */
function pixelOf(hex) {
  return new Uint32Array(Uint8Array.of(...rgb(hex), 255).buffer)[0];
}

/** Offsets (column, row, ...) of the pixels of a disc. */
function discOf(radius) {
  const offsets = [];
  const reach = Math.ceil(radius);
  for (let row = -reach; row <= reach; row++) {
    for (let column = -reach; column <= reach; column++) {
      if (Math.hypot(column, row) <= radius) offsets.push(column, row);
    }
  }
  return Int32Array.from(offsets);
}
