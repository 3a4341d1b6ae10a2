// The sample under the pointer: its picture and its name, beside the pointer.

import { element } from "./dom.js";
import { picture } from "./thumbnails.js";

const WIDTH = 260; // pixels beside the pointer that a tip needs
const HEIGHT = 90;

export class SampleTip {
  constructor(root) {
    Object.assign(this, { root, sample: -1 });
  }

  /** @param sample under the pointer, or -1 */
  show(node, sample, event) {
    const { root } = this;
    root.hidden = sample < 0;
    if (sample >= 0) {
      if (sample !== this.sample) {
        const words = [`sample ${node.id(sample)}, ${node.className(sample)}`, node.name(sample)].filter(Boolean);
        root.replaceChildren(picture(node, sample, 56), element("span", {}, words.join(", ")));
      }
      const isRight = event.clientX > window.innerWidth - WIDTH;
      root.style.left = isRight ? "" : `${event.clientX + 14}px`;
      root.style.right = isRight ? `${window.innerWidth - event.clientX + 14}px` : "";
      root.style.top = `${Math.min(event.clientY + 12, window.innerHeight - HEIGHT)}px`;
    }
    this.sample = sample;
  }
}
