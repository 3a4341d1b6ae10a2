// Samples as people see them: an image from a sprite, a row of a table, or a text. And a grid that builds only what is visible.

import { classColour } from "./colours.js";
import { element, valueText } from "./dom.js";

const CELL_EDGE = 44; // pixels of an image in the grid

/** Create the picture of a sample in a box of an edge. The pixels of a sprite are never read. */
export function picture(node, sample, edge) {
  const { sprites, rows } = node.manifest;
  if (!sprites) {
    const box = element("span", { class: rows ? "words" : "words missing" }, `${node.id(sample)}`);
    if (rows) node.row(sample).then((row) => (box.textContent = rowText(row, rows.columns)), () => {});
    return box;
  }
  const factor = edge / Math.max(sprites.width, sprites.height);
  const [width, height] = [sprites.width * factor, sprites.height * factor];
  const place = sample % sprites.page;
  const [column, row] = [place % sprites.per_row, Math.floor(place / sprites.per_row)];
  const image = element("span", { class: sprites.pixelated ? "picture pixelated" : "picture" });
  Object.assign(image.style, {
    width: `${width}px`,
    height: `${height}px`,
    backgroundImage: `url("${encodeURI(sprites.files[Math.floor(sample / sprites.page)])}")`,
    backgroundSize: `${sprites.per_row * width}px auto`,
    backgroundPosition: `${-column * width}px ${-row * height}px`,
  });
  return image;
}

/** Text of a row of a table ("column value, ..."), or the text itself. */
export function rowText(row, columns) {
  if (row === null) return "cannot be read";
  if (typeof row === "string") return row;
  return row.map((value, i) => (columns ? `${columns[i]} ${valueText(value ?? NaN)}` : valueText(value ?? NaN))).join(", ");
}

/** A grid of samples that scrolls; only the rows in view are in the page. */
export class ThumbnailGrid {
  /** @param onPick called with the sample of a button that is pressed. */
  constructor(root, onPick) {
    Object.assign(this, { root, onPick });
    this.inner = element("div", { class: "inner" });
    root.replaceChildren(this.inner);
    root.addEventListener("scroll", () => {
      this.top = root.scrollTop;
      this.paint();
    });
    root.addEventListener("keydown", (event) => this.step(event));
    // Sizes are kept: to read them after a change of the page would lay it out at once.
    this.top = 0;
    new ResizeObserver(() => {
      Object.assign(this, { width: root.clientWidth, height: root.clientHeight });
      this.paint();
    }).observe(root);
  }

  /** @param order samples in the order to show them; @param marked the sample of the detail pane. */
  show(node, order, marked) {
    Object.assign(this, { node, order, marked });
    if (this.top) this.root.scrollTop = 0;
    this.top = 0;
    this.paint();
  }

  /** Mark the sample of the detail pane. */
  mark(sample) {
    this.marked = sample;
    this.paint();
  }

  measure() {
    const hasImages = Boolean(this.node.manifest.sprites);
    const width = hasImages ? CELL_EDGE + 6 : this.width - 16;
    const height = hasImages ? CELL_EDGE + 9 : 34;
    return { width, height, columns: Math.max(1, Math.floor(this.width / width)) };
  }

  /** Arrow keys: show the next sample in that direction. */
  step(event) {
    const { height, columns } = this.measure();
    const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: columns, ArrowUp: -columns }[event.key];
    if (!step || !this.order.length) return;
    event.preventDefault();
    const place = this.order.indexOf(this.marked) + step;
    const next = Math.min(this.order.length - 1, Math.max(0, place));
    const top = Math.floor(next / columns) * height;
    if (top < this.top) this.root.scrollTop = top;
    else if (top + height > this.top + this.height) this.root.scrollTop = top + height - this.height;
    this.onPick(this.order[next]);
  }

  paint() {
    if (!this.order || !this.width) return;
    const { width, height, columns } = this.measure();
    const first = Math.floor(this.top / height);
    const visible = Math.ceil(this.height / height) + 1;
    this.inner.style.height = `${Math.ceil(this.order.length / columns) * height}px`;
    const samples = this.order.subarray(first * columns, (first + visible) * columns);
    const cells = Array.from(samples, (sample, k) => {
      const { node } = this;
      const name = `sample ${node.id(sample)}, ${node.className(sample)}`;
      const cell = element(
        "button",
        {
          type: "button",
          class: sample === this.marked ? "cell marked" : "cell",
          tabindex: -1, // the grid takes the focus, and arrow keys move within
          title: [name, node.name(sample)].filter(Boolean).join(", "),
          "aria-label": name,
          onclick: () => this.onPick(sample),
        },
        picture(node, sample, CELL_EDGE),
      );
      Object.assign(cell.style, {
        left: `${(k % columns) * width}px`,
        top: `${(first + Math.floor(k / columns)) * height}px`,
        width: `${width - 4}px`,
        height: `${height - 4}px`,
        borderBottomColor: classColour(node.labels[sample]),
      });
      return cell;
    });
    this.inner.replaceChildren(...cells);
  }
}
