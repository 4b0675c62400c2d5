// A mask painted over a picture with a brush, by pointer or keys. What is painted is to be made anew, from noise, and
// is shown as noise.

import { noise } from "./noise.js";

const UNDO_AT_MOST = 30;

/** Paints on `canvas`, which lies over the picture; `ring` shows the brush. */
export class Mask {
  constructor(canvas, ring) {
    Object.assign(this, { canvas, ring, erasing: false, share: 0.16, drawing: false, at: null, past: [] });
    this.context = canvas.getContext("2d", { willReadFrequently: true });
    canvas.addEventListener("pointerdown", (event) => this.#begin(event));
    canvas.addEventListener("pointermove", (event) => this.#move(event));
    for (const name of ["pointerup", "pointercancel"]) canvas.addEventListener(name, () => this.#finish());
    canvas.addEventListener("pointerleave", () => this.#hideRing());
    canvas.addEventListener("keydown", (event) => this.#press(event));
    canvas.addEventListener("focus", () => this.#place(this.at ?? this.#middle(), canvas.matches(":focus-visible")));
    canvas.addEventListener("blur", () => this.#hideRing());
  }

  /** Begin anew over a picture of this size. */
  fit(width, height) {
    this.canvas.width = width;
    this.canvas.height = height;
    this.context.fillStyle = this.context.createPattern(noise("mask"), "repeat");
    this.past = [];
    this.at = null;
    this.#changed();
  }

  /** The brush's width as a share of the picture's longer side. */
  set size(share) {
    this.share = share;
    if (this.at) this.#place(this.at, !this.ring.hidden);
  }

  /** Whether nothing is painted. */
  get empty() {
    return !this.#pixels().some((value, at) => at % 4 === 3 && value);
  }

  undo() {
    const before = this.past.pop();
    if (before) this.context.putImageData(before, 0, 0);
    this.#changed();
  }

  clear() {
    this.#remember();
    this.context.clearRect(0, 0, this.canvas.width, this.canvas.height);
    this.#changed();
  }

  /** The mask as a PNG file: transparent where it was painted, black elsewhere. */
  async file() {
    const { width, height } = this.canvas;
    const canvas = new OffscreenCanvas(width, height), context = canvas.getContext("2d");
    context.fillRect(0, 0, width, height);
    context.globalCompositeOperation = "destination-out";
    context.drawImage(this.canvas, 0, 0);
    return canvas.convertToBlob({ type: "image/png" });
  }

  #begin(event) {
    if (event.button !== 0) return;
    event.preventDefault();
    this.canvas.focus({ focusVisible: false });
    this.canvas.setPointerCapture(event.pointerId);
    this.#remember();
    this.drawing = true;
    this.#draw(this.#point(event));
  }

  #move(event) {
    const point = this.#point(event);
    if (this.drawing) this.#draw(point);
    this.#place(point, event.pointerType !== "touch");
  }

  #finish() {
    this.drawing = false;
    this.#changed();
  }

  #press(event) {
    const pace = Math.max(1, Math.round(this.#diameter / 4));
    const moves = { ArrowLeft: [-pace, 0], ArrowRight: [pace, 0], ArrowUp: [0, -pace], ArrowDown: [0, pace] };
    const sizes = { "[": 0.8, "]": 1.25 };
    if (event.key in moves) this.#step(moves[event.key], event.shiftKey);
    else if (event.key === " ") this.#dab();
    else if (event.key in sizes) this.canvas.dispatchEvent(new CustomEvent("resize-brush", { detail: sizes[event.key] }));
    else if (event.key === "z" && (event.ctrlKey || event.metaKey)) this.undo();
    else return;
    event.preventDefault();
  }

  /** Move the brush by keys; with Shift it paints on the way. */
  #step([right, down], painting) {
    const { x, y } = this.at ?? this.#middle();
    const inside = (value, most) => Math.max(0, Math.min(most, value));
    const point = { x: inside(x + right, this.canvas.width), y: inside(y + down, this.canvas.height) };
    if (painting) {
      this.#remember();
      this.#stroke({ x, y }, point);
      this.#changed();
    }
    this.#place(point, true);
  }

  #dab() {
    this.#remember();
    this.#stamp(this.at ?? this.#middle());
    this.#changed();
  }

  #draw(point) {
    this.#stroke(this.last && this.drawing ? this.last : point, point);
    this.last = point;
  }

  #stroke(from, to) {
    const steps = Math.max(1, Math.ceil(Math.hypot(to.x - from.x, to.y - from.y) / Math.max(1, this.#diameter / 6)));
    for (let at = 0; at <= steps; at++) {
      this.#stamp({ x: from.x + ((to.x - from.x) * at) / steps, y: from.y + ((to.y - from.y) * at) / steps });
    }
  }

  /** A disc of whole pixels: none is half painted. */
  #stamp({ x, y }) {
    const radius = this.#diameter / 2;
    for (let row = Math.ceil(y - radius - 0.5); row <= y + radius - 0.5; row++) {
      const half = Math.sqrt(radius * radius - (row + 0.5 - y) ** 2);
      const left = Math.ceil(x - half - 0.5), right = Math.floor(x + half - 0.5);
      if (this.erasing) this.context.clearRect(left, row, right - left + 1, 1);
      else this.context.fillRect(left, row, right - left + 1, 1);
    }
  }

  get #diameter() {
    return Math.max(1.5, this.share * Math.max(this.canvas.width, this.canvas.height));
  }

  #middle() {
    return { x: this.canvas.width / 2, y: this.canvas.height / 2 };
  }

  #point(event) {
    const box = this.canvas.getBoundingClientRect();
    return {
      x: ((event.clientX - box.left) / box.width) * this.canvas.width,
      y: ((event.clientY - box.top) / box.height) * this.canvas.height,
    };
  }

  /** Put the brush at a point, and show it there. */
  #place(point, shown) {
    this.at = point;
    const scale = this.canvas.clientWidth / this.canvas.width, size = this.#diameter * scale;
    const { style } = this.ring;
    style.width = style.height = `${size}px`;
    style.transform = `translate(${this.canvas.offsetLeft + point.x * scale - size / 2}px, ${this.canvas.offsetTop + point.y * scale - size / 2}px)`;
    this.ring.hidden = !shown;
  }

  #hideRing() {
    this.ring.hidden = true;
  }

  #remember() {
    this.last = null;
    this.past = [...this.past.slice(1 - UNDO_AT_MOST), this.context.getImageData(0, 0, this.canvas.width, this.canvas.height)];
  }

  #pixels() {
    return this.context.getImageData(0, 0, this.canvas.width, this.canvas.height).data;
  }

  #changed() {
    this.canvas.dispatchEvent(new Event("mask"));
  }
}
