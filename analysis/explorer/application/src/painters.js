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
    this.layOut();
  }

  setPoints(x, y, colours, palette, grey) {
    Object.assign(this, { x, y, colours, selected: null });
    this.palette = Uint32Array.from(palette, pixelOf);
    this.grey = pixelOf(grey);
    return this.layOut();
  }

  select(points) {
    this.selected = points;
    return this.repaint();
  }

  setView(view) {
    this.view = view;
    this.layOut();
  }

  /** Forget the places of the points, and the pictures of all points in grey and in colour. */
  layOut() {
    this.places = this.inGrey = this.inColour = null;
    return this.repaint();
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

  /**
   * Write the pixels of the points: for 50,000 ten times as fast as a rectangle each. All points in grey, or in colour, are kept
   * as a picture while they stay in place, so that a selection writes its own points alone.
   */
  paint() {
    if (!this.x) return;
    const { width, height } = this.canvas;
    if (!this.places) {
      this.places = this.findPlaces();
      this.image = new ImageData(width, height);
      this.pixels = new Uint32Array(this.image.data.buffer);
    }
    const { selected, colours, palette } = this;
    if (selected && selected.length < this.x.length) {
      this.inGrey ??= this.paintAll(() => this.grey);
      this.pixels.set(this.inGrey);
      for (let k = 0; k < selected.length; k++) this.put(this.pixels, selected[k], palette[colours[selected[k]]]);
    } else {
      this.inColour ??= this.paintAll((i) => palette[colours[i]]);
      this.pixels.set(this.inColour);
    }
    this.canvas.getContext("2d").putImageData(this.image, 0, 0);
  }

  paintAll(colourOf) {
    const pixels = new Uint32Array(this.pixels.length);
    for (let i = 0; i < this.x.length; i++) this.put(pixels, i, colourOf(i));
    return pixels;
  }

  /** Column and row of each point, Int32Array [2 N]. */
  findPlaces() {
    const { width, height } = this.canvas;
    const { scale, shiftX, shiftY } = this.view;
    this.disc = discOf((pointSize(this.x.length) * this.ratio) / 2);
    const places = new Int32Array(2 * this.x.length);
    for (let i = 0; i < this.x.length; i++) {
      places[2 * i] = Math.round(((scale * this.x[i] + shiftX + 1) / 2) * width);
      places[2 * i + 1] = Math.round(((1 - scale * this.y[i] - shiftY) / 2) * height);
    }
    return places;
  }

  put(pixels, i, colour) {
    const { disc, places } = this;
    const { width, height } = this.canvas;
    for (let k = 0; k < disc.length; k += 2) {
      const [column, row] = [places[2 * i] + disc[k], places[2 * i + 1] + disc[k + 1]];
      if (column >= 0 && column < width && row >= 0 && row < height) pixels[row * width + column] = colour;
    }
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
